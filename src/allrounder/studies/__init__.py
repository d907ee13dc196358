"""One study per paper: the claim, re-measured. Run with `allrounder study SLUG`."""
