"""What the host's vector registers hold."""

from llvmlite import binding

__all__ = ["VECTOR_BYTES"]


def _vector_bytes() -> int:
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx2") else 16


#: Bytes in one vector register of this CPU: 64 (AVX-512), 32 (AVX2) or 16 (NEON, SSE).
VECTOR_BYTES = _vector_bytes()
