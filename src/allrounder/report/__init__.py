"""The report of a run: one dict, written as JSON, drawn as a page that needs no network, printed as a table.

`build` makes the dict from what the steps of a run gave, `write` draws `report.html`, `summary` is the table
that the command line prints. The dict is `report.json`; a figure that is no number is `null` in it.

    title     heading, from the recipe
    suite     name of the suite
    base      the base model: what the recipe names, or how it was made
    metric    what the scores are, in a word: "accuracy"
    seeds     seeds of the repetitions
    tasks     names of the tasks
    chosen    null, or the merged model that was written
        method      its name in `methods`: the single merged model with the best mean validation score
        validation  that score, mean over tasks and seeds
        test        the same on the test splits
        path        its folder, beside the report
    methods   list, in the order of the recipe
        name, title, family          "ties", "TIES", "data-free"; references have the family "reference"
        needs       what the method must be given beside the models, in words
        single      whether it gives one model for all tasks
        options     options of the recipe
        paper       null, or slug (of the catalogue), title, authors, venue, year, arxiv
        scores      seed -> task -> score on the test split
        validation  seed -> task -> score on the validation split
        normalised  seed -> task -> percent of the score of the task's own expert, on test
        mean        seed -> mean of `normalised` over the tasks whose expert scores above 0;
                    null when one of the method's scores on them is no number
        bytes       stored to serve all tasks, heads not counted; mean over seeds
        seconds     spent merging, scoring not counted; mean over seeds
        note        a setting that was chosen, or a warning
    cross     rows (experts), columns (tasks), values (score on test); mean over seeds
    cosine    names (experts), values (cosines between task vectors); mean over seeds
    coefficients  list, one entry for each method that learned some, of the first seed
        method, rows (experts), columns (tensors, or one for all), values
    sequences  list, one entry for each method that learned the tasks one after another
        method, rows (what came), columns (tasks), values (score on validation, null before a task was learned);
        mean over seeds
    compressed  absent, or what was made of the chosen model
        of        its name, title, mean, scores, bytes, and latency (seconds for 32 inputs, 8 of texts, median, one
                  thread)
        rows      name, title, family, single, options, paper, scores, mean, bytes, latency, seconds, note, path
    ran       command, device, cores, started, seconds, versions (package -> version),
              steps (list of name, seconds, cached)
    notes     sentences on how to read the figures, and on what is missing and why
"""

from .build import build, compressed
from .page import write
from .ranking import summary

__all__ = ["build", "compressed", "summary", "write"]
