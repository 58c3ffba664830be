"""Rows, pictures and dialogues become batches, for training and for inference; labels are checked on the way."""
