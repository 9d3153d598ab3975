"""What everything here wants of a mesh."""

from torch.distributed.device_mesh import DeviceMesh

__all__ = ["check_mesh"]


def check_mesh(op: str, mesh: DeviceMesh, name: str) -> None:
    """Raise TypeError or ValueError unless this is a mesh of one dimension, as ``name`` is in a larger one."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"{op}: mesh must be a torch.distributed.DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f'{op}: mesh must have one dimension, got {mesh.ndim}; take one of it, such as mesh["{name}"]')
