"""What pickles name of models that were fused before 0.2; those that are made now name :mod:`.rewriting`."""

raise ImportError(
    "this model was saved fused by resnet_fused 0.1, whose fused forwards this version cannot read: with 0.1, load it, "
    "unfuse(model), and save it again, or save its state_dict()"
)
