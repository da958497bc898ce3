"""Part of the zoo: every gradient of real architectures equals that of K plain backward passes."""

import pytest
from zoo import cases
from zoo_oracle import judge

CASES = cases()
NAMES = [
    "TransformerEncoder", "LSTM", "U-Net", "weight_norm", "spectral_norm", "nanoGPT",
    "Llama with its own RMSNorm", "ViT with bare parameters", "mixture of experts",
    "two views as one batch", "time-major inside", "a norm of a table",
    "weights used past their layers", "GPT-2", "GPT-2 with checkpointing", "BERT", "T5", "Mixtral",
    "Swin", "Wav2Vec2",
]  # fmt: skip


# With 2 samples most numbers of rows are a multiple of the batch; with 8 the batch is as long as
# the sequences.
@pytest.mark.parametrize(
    "samples",
    [
        pytest.param(2, marks=[pytest.mark.slow, pytest.mark.rare]),
        pytest.param(5, marks=pytest.mark.slow),
        8,
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_one_backward_pass_per_cluster(name, samples):
    assert judge(CASES[name], samples, backend="torch").problems() == []


@pytest.mark.parametrize("name", ["nanoGPT", "mixture of experts", "time-major inside"])
def test_microbatches_take_every_model(name):
    verdict = judge(CASES[name], mode="microbatch", backend="torch")
    assert verdict.problems() == []
    assert set(verdict.tiers.values()) == {"native"}
