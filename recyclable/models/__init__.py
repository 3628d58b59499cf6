"""Models of a base with the right head and adapter, built unread: every parameter knows where its values come from.

Whatever the base lacks is drawn from seed and tensor name. Values are read when the model is about to be used:
`weights.sources.fill` for one process, `training.zero.materialize` for a DeepSpeed engine.
"""
