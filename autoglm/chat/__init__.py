"""Text around the model: tokenizer, chat template, grammar, output parser."""
