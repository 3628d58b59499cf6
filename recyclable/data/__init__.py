"""Text in, batches out: corpora, labelled tasks, few-shot samples, order and masks."""
