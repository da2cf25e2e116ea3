"""Training of the bundled question-answering model. Not imported by any service."""
