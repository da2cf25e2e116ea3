"""Why a model answered so: attribution to words and attention, across the stages of a pipeline."""
