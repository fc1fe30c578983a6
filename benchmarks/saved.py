"""What autograd saves for backward. Imports torch alone: the tests count with it, too."""

from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(model, *inputs, forward=None):
    """Bytes of the distinct storages saved by a forward of the model, beside its own parameters and buffers.

    ``forward``: how the model is called, where not by itself.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = (forward or model)(*inputs)  # which keeps what was saved: no storage takes another's address
    del output
    return sum(size for address, size in sizes.items() if address not in own)
