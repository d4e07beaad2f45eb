"""DFloat11 without a GPU: what weights shrink to, and how fast one core packs and unpacks them.

    OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks.dfloat11 [number of weights]

Bit-equality is checked on the way. Times are the process's own, so that other programs do not count.
"""

import sys
import time

import torch

from openbagel.dfloat11 import decode, encode


def main(count: int) -> None:
    torch.set_num_threads(1)
    weights = (torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    start = time.process_time()
    buffers = encode(weights)
    packed = time.process_time()
    assert buffers is not None
    again = decode(buffers)
    done = time.process_time()
    assert torch.equal(again.view(torch.int16), weights.view(torch.int16))
    share = sum(buffer.nbytes for buffer in buffers.values()) / weights.nbytes
    speeds = [weights.nbytes / 1e6 / seconds for seconds in (packed - start, done - packed)]
    print(f"{count:,} weights: {share:.1%} of bfloat16, packed {speeds[0]:.0f}, read {speeds[1]:.0f} MB/s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50_000_000)
