"""The report of a run: measures, figures, page, model card."""
