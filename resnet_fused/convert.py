def fuse(model, filter_fn=None): raise NotImplementedError
def unfuse(model): raise NotImplementedError
