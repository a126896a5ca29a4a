"""Everything that makes the models in `data/models/`: grammar, tokenizer, training, evaluation."""
