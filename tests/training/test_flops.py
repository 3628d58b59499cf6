"""FLOPs per token: trained, frozen and teacher parameters cost what they should, embeddings nothing."""

from torch import nn

from recyclable.training.flops import flops_per_token, peak_flops


def _model(train: bool) -> nn.Module:
    model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 5, bias=False))
    return model.requires_grad_(train)


def test_trained_parameters_cost_six_frozen_four_teacher_two_and_embeddings_nothing():
    whole = nn.ModuleDict({"student": _model(True), "teacher": _model(False)})
    assert flops_per_token(whole) == 6 * 20 + 2 * 20
    whole["student"].requires_grad_(False)
    assert flops_per_token(whole) == 4 * 20 + 2 * 20


def test_without_an_accelerator_there_is_no_peak_to_compare_with(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert peak_flops() is None


def test_the_longest_device_name_wins(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for name, peak in {
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L4": 121e12,
    }.items():
        monkeypatch.setattr("torch.cuda.get_device_name", lambda name=name: name)
        assert peak_flops() == peak
