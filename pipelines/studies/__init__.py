"""Small studies of what this project claims: `python -m pipelines.studies.NAME` repeats one and writes its table."""
