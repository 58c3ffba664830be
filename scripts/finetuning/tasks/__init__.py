"""One file for each task: questions, scores, baselines and tables."""
