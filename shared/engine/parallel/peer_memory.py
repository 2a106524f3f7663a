"""Memory of each rank's GPU that the GPUs of the others read and write: CUDA's handles for other processes (IPC)."""

import ctypes
from typing import Protocol

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from shared.errors import Unsupported

HANDLE_BYTES = 64
ENABLE_PEER_ACCESS = 1


class Memory(Protocol):
    """One GPU's memory, and the way to that of others."""

    device: int

    def allocate(self, num_bytes: int) -> tuple[int, bytes]:
        """Where zeroed memory is, which nobody frees, and the handle by which another process opens it. Raises
        Unsupported."""

    def open(self, handle: bytes, owner: int) -> int:
        """Where memory of another process, on the GPU `owner`, is for this one. Raises Unsupported."""


def share(num_bytes: int, memory: Memory, store: Store, rank: int, num_ranks: int) -> list[int]:
    """Zeroed memory of every rank: where it is for this one. All ranks call this together; it is kept until the process
    ends, for others may use it. Raises Unsupported, on all of them, if one GPU does not reach another."""
    obstacle, own, handle, addresses = "", 0, b"", list[int]()
    try:
        own, handle = memory.allocate(num_bytes)
    except Unsupported as error:
        obstacle = error.message
    store.set(f"memory {rank}", f"{memory.device} {handle.hex()}")
    said = [store.get(f"memory {peer}").decode().split(" ") for peer in range(num_ranks)]
    try:
        for peer, (device, told) in enumerate(said):
            if not told:
                raise Unsupported(obstacle or f"rank {peer} has no memory to share")
            addresses.append(own if peer == rank else memory.open(bytes.fromhex(told), int(device)))
    except Unsupported as error:
        obstacle = error.message
    store.set(f"obstacle {rank}", obstacle)
    obstacles = [text for peer in range(num_ranks) if (text := store.get(f"obstacle {peer}").decode())]
    if obstacles:
        raise Unsupported(obstacles[0])
    return addresses


class _Handle(ctypes.Structure):
    """Passed by value, as the runtime wants it."""

    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class CudaMemory:
    """Satisfies `Memory` for this thread's current GPU, by those functions of CUDA's runtime, which torch has loaded,
    that torch does not offer."""

    def __init__(self) -> None:
        """Raises Unsupported."""
        self.device = torch.cuda.current_device()
        try:
            self._library = ctypes.CDLL(f"libcudart.so.{(torch.version.cuda or '0').partition('.')[0]}")
        except OSError as error:
            raise Unsupported(str(error)) from None
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self._library.cudaIpcOpenMemHandle.argtypes = (ctypes.POINTER(ctypes.c_void_p), _Handle, ctypes.c_uint)

    def allocate(self, num_bytes: int) -> tuple[int, bytes]:
        """See `Memory.allocate`."""
        address, handle = ctypes.c_void_p(), _Handle()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        self._call("cudaMemset", address, 0, ctypes.c_size_t(num_bytes))
        self._call("cudaIpcGetMemHandle", ctypes.byref(handle), address)
        torch.cuda.synchronize()
        return address.value or 0, bytes(handle)

    def open(self, handle: bytes, owner: int) -> int:
        """See `Memory.open`."""
        reaches, address = ctypes.c_int(), ctypes.c_void_p()
        self._call("cudaDeviceCanAccessPeer", ctypes.byref(reaches), self.device, owner)
        if not reaches.value:
            raise Unsupported(f"GPU {self.device} cannot reach into the memory of GPU {owner}")
        self._call("cudaIpcOpenMemHandle", ctypes.byref(address), _Handle.from_buffer_copy(handle), ENABLE_PEER_ACCESS)
        return address.value or 0

    def _call(self, name: str, *arguments: object) -> None:
        error = getattr(self._library, name)(*arguments)
        if error:
            raise Unsupported(f"{name}: {self._library.cudaGetErrorString(error).decode()}")
