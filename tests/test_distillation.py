"""What a student learns from a teacher, against torch's own losses and autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.distillation import distillation_loss, feature_loss, float_copy, logits_of
from lq.distiller import Distiller


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("shape", [(5, 7), (2, 7, 3, 4)], ids=str)
def test_distillation_loss_is_torchs(shape, temperature):
    student, teacher = torch.randn(shape, requires_grad=True), 3 * torch.randn(shape)
    logs = [F.log_softmax(x / temperature, 1) for x in (student, teacher)]
    summed = F.kl_div(*logs, log_target=True, reduction="sum")
    expected = temperature**2 * summed * shape[1] / student.numel()
    torch.testing.assert_close(distillation_loss(student, teacher, temperature), expected)
    assert float(distillation_loss(teacher, teacher, temperature)) == 0


def test_classes_on_the_last_axis():
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    expected = distillation_loss(student.mT, teacher.mT)
    assert torch.equal(distillation_loss(student, teacher, axis=2), expected)


def test_half_precision_is_computed_in_float():
    student, teacher = torch.randn(4, 5).half(), torch.randn(4, 5).half()
    loss = distillation_loss(student, teacher)
    assert torch.equal(loss, distillation_loss(student.float(), teacher.float()))
    assert feature_loss(student, teacher).dtype is torch.float32


def test_no_gradient_reaches_the_teacher():
    student, teacher = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    (distillation_loss(student, teacher) + feature_loss(student, teacher)).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_feature_loss_has_no_unit():
    student, teacher = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(
        feature_loss(8 * student, 8 * teacher), feature_loss(student, teacher)
    )
    assert feature_loss(torch.zeros(3), torch.zeros(3)) == 0


@pytest.mark.parametrize(
    ("student", "teacher", "match"),
    [
        pytest.param((2, 3), (2, 4), "same shape", id="shapes"),
        pytest.param((2, 1), (2, 1), "two classes", id="one class"),
        pytest.param((3,), (3,), "two classes", id="no axis"),
    ],
)
def test_refusals(student, teacher, match):
    with pytest.raises(ValueError, match=match):
        distillation_loss(torch.zeros(student), torch.zeros(teacher))


def test_float_copy_leaves_the_model_alone():
    model = lq.quantize(nn.Sequential(nn.Linear(20, 16), nn.ReLU()), "tensorrt_int8")
    lq.calibrate(model, [torch.randn(4, 20)], progress=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    copied = float_copy(model)
    assert [type(m) for m in copied] == [nn.Linear, nn.ReLU]
    assert torch.equal(copied[0].weight, model[0].weight)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(ValueError, match=r"float weights of Sequential.*weight_quantizer"):
        float_copy(model, model.state_dict())


class Net(nn.Module):
    """Uses a layer twice, in place arithmetic and dropout."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True))
        self.head = nn.Linear(6, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        return self.head(self.drop(self.body(self.body(x * scale))))


def nets():
    torch.manual_seed(0)
    student = Net()
    return student, copy.deepcopy(student), Net().eval(), torch.randn(8, 6)


def by_hand(student, teacher, x, loss_of):
    """The gradients of the sum of all losses by autograd, features taken by hand."""
    first = student.body(x * 2.0)
    second = student.body(first)
    logits = student.head(student.drop(second))
    with torch.no_grad():
        one = teacher.body(x * 2.0)
        two = teacher.body(one)
        target = teacher.head(two)
    extra = 0.5 * distillation_loss(logits, target, 2.0)
    extra = extra + 3.0 * (feature_loss(first, one) + feature_loss(second, two))
    (loss_of(logits) + extra).backward()
    return extra


LOSSES = {
    "mean square": lambda y: y.square().mean(),
    "saves its result": lambda y: y.square().mean().sqrt(),
    "view of several": lambda y: y.square().mean(0).unbind()[0],
}


@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)
def test_gradients_are_those_of_the_summed_loss(loss_of):
    student, other, teacher, x = nets()
    distiller = Distiller(student, teacher, 2.0, 0.5, ["body"], 3.0)
    distiller.start()
    torch.manual_seed(1)
    loss = loss_of(student(x, scale=2.0))
    value = loss.item()
    distiller.begin_backward()
    loss.backward()
    distiller.end_backward()
    distiller.stop()
    torch.manual_seed(1)
    extra = by_hand(other, teacher, x, loss_of)
    torch.testing.assert_close(distiller.take_loss(), extra.detach())
    assert distiller.take_loss() is None
    assert loss.item() == value
    for (name, mine), theirs in zip(student.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    assert all(torch.equal(a, b) for a, b in zip(student.buffers(), other.buffers(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_the_teacher_runs_once_in_eval_and_inference_mode():
    student, _, teacher, x = nets()
    seen = []
    teacher.train()
    distiller = Distiller(student, teacher)
    teacher.register_forward_hook(lambda m, a, y: seen.append((m.training, y.is_inference())))
    distiller.start()
    student(x)
    with torch.no_grad():
        student(x)
    distiller.stop()
    student(x)
    assert seen == [(False, True)]


def test_only_the_backward_pass_of_the_loss_gets_gradients():
    student, other, teacher, x = nets()
    for net in (student, other):
        net.drop.p = 0.0
    distiller = Distiller(student, teacher)
    distiller.start()
    # A gradient penalty differentiates the output within the training step.
    for net in (student, other):
        inputs = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(inputs).sum(), inputs, create_graph=True)
        if net is student:
            mine = slope
    assert torch.equal(mine, slope)
    # Another optimizer's loss does not go back through the student's last output.
    loss = student(x).detach().sum() * torch.ones((), requires_grad=True)
    distiller.begin_backward()
    loss.backward()
    assert distiller.take_loss() is None
    assert all(p.grad is None for p in student.parameters())


def test_two_backward_passes_get_it_once():
    student, other, teacher, x = nets()
    for net in (student, other):
        net.drop.p = 0.0
    distiller = Distiller(student, teacher)
    distiller.start()
    y = student(x)
    distiller.begin_backward()
    y.sum().backward(retain_graph=True)
    y.square().sum().backward()
    z = other(x)
    (z.sum() + z.square().sum() + distillation_loss(z, teacher(x))).backward()
    for mine, theirs in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_in_place_change_of_the_output_afterwards():
    student, other, teacher, x = nets()
    for net in (student, other):
        net.drop.p = 0.0
    distiller = Distiller(student, teacher)
    distiller.start()
    y = student(x).mul_(2)
    distiller.begin_backward()
    y.sum().backward()
    z = other(x)
    (2 * z.sum() + distillation_loss(z, teacher(x))).backward()
    torch.testing.assert_close(student.head.weight.grad, other.head.weight.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_features_count_once(reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            run = torch.utils.checkpoint.checkpoint
            return self.head(run(self.body, x, use_reentrant=reentrant))

    torch.manual_seed(0)
    student, teacher = Checkpointed(), Net().eval()
    distiller = Distiller(student, teacher, features=["head"])
    distiller.start()
    loss = student(torch.randn(4, 6, requires_grad=True)).sum()
    distiller.begin_backward()
    loss.backward()
    distiller.end_backward()
    distiller.stop()
    assert distiller.take_loss() is not None


def test_a_compiled_student():
    student, other, teacher, x = nets()
    compiled = torch.compile(student, backend="eager")
    for net, original in ((compiled, student), (other, other)):
        original.drop.p = 0.0
        distiller = Distiller(net, teacher)
        distiller.start()
        loss = net(x).sum()
        distiller.begin_backward()
        loss.backward()
        assert distiller.take_loss() is not None
    for mine, theirs in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_feature_names_and_outputs_are_checked():
    student, _, teacher, x = nets()
    with pytest.raises(ValueError, match=r"`features`.*'bodi'.*did you mean 'body'"):
        Distiller(student, teacher, features=["bodi"])
    student.other = teacher.other = nn.Linear(1, 1)
    Distiller(student, teacher, features=["other"]).start()
    with pytest.raises(RuntimeError, match=r"'other'.*0 and 0 times"):
        student(x)


def test_logits_by_name():
    class Output:
        logits = torch.ones(1)

    assert logits_of(Output()) is Output.logits
    with pytest.raises(ValueError, match=r"logits.*tuple"):
        logits_of((torch.ones(1), torch.ones(1)))
