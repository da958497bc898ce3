"""Part of the zoo: every gradient of real architectures equals that of K plain backward passes."""

import pytest
from zoo import cases
from zoo_oracle import judge

CASES = cases()
# Other cases are refused today: positions that all samples share, windows, experts.
WHOLE = [
    "TransformerEncoder", "Transformer", "LSTM", "U-Net", "InstanceNorm2d", "weight_norm",
    "Llama with its own RMSNorm", "ViT with bare parameters", "weights used past their layers",
    "Llama", "Mixtral", "OPT", "ViT", "Wav2Vec2",
]  # fmt: skip
REFUSED = ["nanoGPT", "mixture of experts", "two views as one batch", "BERT", "T5"]


# With a batch of 4 the number of rows of most layers is a multiple of the batch, with 5 it is not.
@pytest.mark.parametrize("samples", [4, 5])
@pytest.mark.parametrize("name", WHOLE)
def test_gradients_are_those_of_one_backward_pass_per_cluster(name, samples):
    assert judge(CASES[name], samples, strict=False, backend="torch").problems() == []


@pytest.mark.parametrize("name", REFUSED)
def test_microbatches_take_every_model(name):
    verdict = judge(CASES[name], mode="microbatch", backend="torch")
    assert verdict.problems() == []
    assert set(verdict.tiers.values()) == {"native"}
