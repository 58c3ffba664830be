"""Loading of models, their parts by name, and which of them are trainable."""
