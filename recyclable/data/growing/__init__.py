"""Vocabularies that grow: new pieces learned from text, added to a tokenizer whose old pieces keep their ids."""
