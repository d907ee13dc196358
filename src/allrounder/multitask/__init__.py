"""Training one model on several tasks together."""
