"""GPUs by name, as their vendors' data sheets have them.

Rates are dense: where a data sheet gives the rate with sparsity, twice what dense matrices get, half of it stands here. Memory
is the data sheet's GB taken as 10⁹ bytes; drivers report up to 7 % more, which is left as a margin. Bandwidth and rate are
peaks that no program reaches: what share of them it does reach is the estimate's to say (``jobs.estimation.machine``).

The vendors' own pages were out of reach when this was written; the figures were checked against public copies of these tables,
but for those of the A30, the A10 and the A10G's rate, which are from memory of the documents named.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. Sizes in bytes, rates a second."""

    title: str
    memory: float
    bandwidth: float
    """Bytes, read and written together."""
    rate: float
    """Dense bf16 operations of matrix products with fp32 sums, two a multiply-add."""
    source: str


def _gpu(title: str, gigabytes: float, gigabytes_per_second: float, tflops: float, source: str) -> Gpu:
    return Gpu(title, gigabytes * 1e9, gigabytes_per_second * 1e9, tflops * 1e12, source)


_A100 = "NVIDIA A100 Tensor Core GPU data sheet (June 2021), table of specifications, p. 3: BFLOAT16 312 | 624* TFLOPS"
_H100 = "NVIDIA H100 Tensor Core GPU data sheet (2023), table of technical specifications"
_H200 = "NVIDIA H200 Tensor Core GPU data sheet (2024), table of technical specifications"
_ADA = "NVIDIA Ada GPU Architecture whitepaper v2, appendix"

GPUS: dict[str, Gpu] = {
    "a10": _gpu("NVIDIA A10", 24, 600, 125, "NVIDIA A10 data sheet (2021), table of specifications: BFLOAT16 125 | 250*"),
    "a10g": _gpu("NVIDIA A10G", 24, 600, 70, "NVIDIA A10G data sheet for AWS (Feb. 2022), table: BFLOAT16 70 | 140*"),
    "a30": _gpu("NVIDIA A30", 24, 933, 165, "NVIDIA A30 data sheet (2021), table of specifications: BFLOAT16 165 | 330*"),
    "a40": _gpu("NVIDIA A40", 48, 696, 149.7, "NVIDIA A40 data sheet (2021), table of specifications: BF16 149.7 | 299.4*"),
    "a100-40": _gpu("NVIDIA A100 40 GB", 40, 1555, 312, _A100),
    "a100-80": _gpu("NVIDIA A100 80 GB SXM", 80, 2039, 312, _A100),
    "a100-80-pcie": _gpu("NVIDIA A100 80 GB PCIe", 80, 1935, 312, _A100),
    "h100": _gpu("NVIDIA H100 SXM", 80, 3350, 989.5, f"{_H100}, H100 SXM: BFLOAT16 1,979*"),
    "h100-pcie": _gpu("NVIDIA H100 PCIe", 80, 2000, 756.5, f"{_H100}, H100 PCIe: BFLOAT16 1,513*"),
    "h200": _gpu("NVIDIA H200 SXM", 141, 4800, 989.5, f"{_H200}, H200 SXM: BFLOAT16 1,979*"),
    "b200": _gpu(
        "NVIDIA B200",
        180,
        8000,
        2250,
        "NVIDIA DGX B200 data sheet (2024), 1,440 GB and 64 TB/s for 8 GPUs; Blackwell "
        "Architecture Technical Brief, table of HGX B200: BF16 2.25 PFLOPS dense",
    ),
    "l4": _gpu("NVIDIA L4", 24, 300, 121, "NVIDIA L4 Tensor Core GPU data sheet (2023), table: BFLOAT16 242*"),
    "l40": _gpu(
        "NVIDIA L40", 48, 864, 181.05, "NVIDIA L40 data sheet (2023), table of specifications: BFLOAT16 181.05 | 362.1*"
    ),
    "l40s": _gpu(
        "NVIDIA L40S", 48, 864, 362.05, "NVIDIA L40S data sheet (2023), table of specifications: BFLOAT16 362.05 | 733*"
    ),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", 24, 1008, 165.2, f"{_ADA} A, table 2: BF16 with FP32 accumulate 165.2 | 330.4*"),
}
"""By the name that ``--gpu`` takes; * is with sparsity."""

# What torch.cuda.get_device_name says, in lower case: the longer names first, as one may be part of another. A bare "A100" in
# 80 GB is the SXM module unless it says PCIe.
_REPORTED = {
    "a100-pcie-40gb": "a100-40",
    "a100-sxm4-40gb": "a100-40",
    "a100 80gb pcie": "a100-80-pcie",
    "a100-sxm4-80gb": "a100-80",
    "h100 pcie": "h100-pcie",
    "h100 80gb hbm3": "h100",
    "h200 nvl": None,
    "h200": "h200",
    "b200": "b200",
    "l40s": "l40s",
    "l40": "l40",
    "l4": "l4",
    "a10g": "a10g",
    "a10": "a10",
    "a30": "a30",
    "a40": "a40",
    "rtx 4090 laptop": None,
    "rtx 4090": "rtx4090",
}


def find(name: str) -> Gpu:
    """The GPU that ``--gpu`` names. Raises ``ValueError`` for one that the table lacks."""
    key = name.lower().replace("_", "-")
    if key not in GPUS:
        raise ValueError(
            f"gpu={name!r} is not in the table ({', '.join(GPUS)}); give --gpu-memory, --gpu-bandwidth and --gpu-rate instead"
        )
    return GPUS[key]


def reported(device: str) -> Gpu | None:
    """The GPU that CUDA calls ``device``, as runs record it; None for one that the table lacks."""
    said = f"{device.lower()} "
    for name, key in _REPORTED.items():
        if f"{name} " in said:
            return GPUS[key] if key is not None else None
    return None
