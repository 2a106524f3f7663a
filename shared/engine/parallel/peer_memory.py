"""Memory of each rank's GPU that the GPUs of the others read and write: CUDA's handles for other processes (IPC)."""

import ctypes

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from shared.errors import Unsupported

HANDLE_BYTES = 64
ENABLE_PEER_ACCESS = 1
NATIVE_ATOMICS = 2  # an attribute of a pair of GPUs: between them, atomic operations are whole
Handle = ctypes.c_char * HANDLE_BYTES


class _Handle(ctypes.Structure):
    """Passed by value, as the runtime wants it."""

    _fields_ = (("reserved", Handle),)


def share(num_bytes: int, store: Store, rank: int, num_ranks: int) -> list[int]:
    """Zeroed memory of every rank, on the current device of each: where it is for this one. All ranks call this
    together; it is kept until the process ends, for others may use it. Raises Unsupported, on all of them, if one GPU
    does not reach another."""
    obstacle, own, handle = "", 0, b""
    device = torch.cuda.current_device()
    try:
        runtime = _Runtime()
        own, handle = runtime.allocate(num_bytes)
    except (OSError, Unsupported) as error:
        obstacle = str(error)
    store.set(f"memory {rank}", f"{device} {handle.hex()}")
    said = [store.get(f"memory {peer}").decode().split(" ") for peer in range(num_ranks)]
    addresses = []
    for peer, (theirs, told) in enumerate(said if not obstacle else ()):
        try:
            addresses.append(own if peer == rank else runtime.open(bytes.fromhex(told), device, int(theirs)))
        except Unsupported as error:
            obstacle = str(error)
            break
    store.set(f"reached {rank}", obstacle)
    obstacles = [text for peer in range(num_ranks) if (text := store.get(f"reached {peer}").decode())]
    if obstacles:
        raise Unsupported(obstacles[0])
    return addresses


class _Runtime:
    """Those functions of CUDA's runtime, which torch has loaded, that torch does not offer."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(f"libcudart.so.{(torch.version.cuda or '0').partition('.')[0]}")
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self._library.cudaIpcOpenMemHandle.argtypes = (ctypes.POINTER(ctypes.c_void_p), _Handle, ctypes.c_uint)

    def allocate(self, num_bytes: int) -> tuple[int, bytes]:
        """Zeroed memory and the handle by which another process opens it."""
        address, handle = ctypes.c_void_p(), _Handle()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        self._call("cudaMemset", address, 0, ctypes.c_size_t(num_bytes))
        self._call("cudaIpcGetMemHandle", ctypes.byref(handle), address)
        torch.cuda.synchronize()
        return address.value or 0, bytes(handle)

    def open(self, handle: bytes, device: int, owner: int) -> int:
        """Where the memory of a process with `owner` as its device is for this one. Without a handle it has none."""
        if not handle:
            raise Unsupported("another rank has no memory to share")
        reaches, whole, address = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        if owner != device:
            self._call("cudaDeviceCanAccessPeer", ctypes.byref(reaches), device, owner)
            self._call("cudaDeviceGetP2PAttribute", ctypes.byref(whole), NATIVE_ATOMICS, device, owner)
            if not reaches.value or not whole.value:
                raise Unsupported(f"GPU {device} cannot reach into the memory of GPU {owner}")
        self._call("cudaIpcOpenMemHandle", ctypes.byref(address), _Handle.from_buffer_copy(handle), ENABLE_PEER_ACCESS)
        return address.value or 0

    def _call(self, name: str, *arguments: object) -> None:
        error = getattr(self._library, name)(*arguments)
        if error:
            raise Unsupported(f"{name}: {self._library.cudaGetErrorString(error).decode()}")
