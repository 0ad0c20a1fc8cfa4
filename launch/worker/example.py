"""A micro-batch shaped like the job's, for plans that need one look at a forward pass."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from meshwright.launch.spec.job import Job

__all__ = ["example_batch"]


def example_batch(job: "Job", *, device: str = "cpu") -> dict[str, Tensor]:
    """Random tokens in the shape of the largest micro-batch of a job, (samples, sequence_length).

    Args:
        job: with `model`, `data` and `train`.
        device: where the tensors are; "meta" gives them no values.
    """
    assert job.data is not None, "a job that trains a model has data"
    parts = job.mesh.data_degree * job.parallel.num_microbatches
    samples = -(-job.train.batch_size // parts) if job.train else 1
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 2, (samples, job.data.sequence_length), generator=generator)  # any vocabulary has two
    return {"input_ids": tokens.to(device), "labels": tokens.to(device)}
