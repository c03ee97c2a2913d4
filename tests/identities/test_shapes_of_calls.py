"""In tests every call of the maths and of the models is held to the shapes it is annotated with."""

import pytest
import torch
from jaxtyping import TypeCheckError

import shapes_held
from ldm.diffusion import Condition, DiscreteVP, Level, Objective, Prediction
from ldm.models.codec import Moments, VaeCodec
from tiny import vae

B = 3
LEVEL = Level(torch.full((B,), 0.8), torch.full((B,), 0.6))


@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (4, 6, 6), (2, 4, 6, 6)])
def test_any_number_of_axes_behind_the_batch(shape):
    x = torch.ones(B, *shape)
    assert Prediction(x, LEVEL, x, "eps").x0.shape == x.shape
    assert DiscreteVP().perturb(x, x, torch.full((B,), 0.5)).shape == x.shape


def test_another_shape_is_refused():
    x, tokens = torch.ones(B, 4, 6, 6), torch.ones(B, 7, 8)
    cond = Condition(tokens, torch.ones(B, 7, dtype=torch.bool), torch.ones(B, 8))
    every = (
        lambda: Prediction(x, LEVEL, x[:, :2], "eps"),
        lambda: Prediction(x, LEVEL, x[:2], "eps"),
        lambda: Prediction(x.long(), LEVEL, x, "eps"),
        lambda: Condition(tokens[0]),
        lambda: Condition(tokens, torch.ones(B, 6, dtype=torch.bool)),
        lambda: Condition(tokens, torch.ones(B, 7)),
        lambda: Condition(tokens, None, torch.ones(B - 1, 8)),
        lambda: Condition(tokens, extra={"sizes": torch.ones(B - 1, 2)}),
        lambda: cond.where(torch.ones(B, 1, dtype=torch.bool), cond),
        lambda: DiscreteVP().perturb(x, x[0], torch.full((B,), 0.5)),
        lambda: Objective()(
            DiscreteVP(), lambda *_: x, x, cond, u=torch.full((B - 1,), 0.5), eps=x
        ),
        lambda: VaeCodec(vae()).encode(torch.ones(B, 1, 16, 16)),
        lambda: VaeCodec(vae()).decode(torch.ones(B, 4, 8)),
        lambda: VaeCodec(vae()).sample(Moments(x, x), torch.ones(B, 4, 6)),
    )
    for number, wrong in enumerate(every):
        with pytest.raises(TypeCheckError):
            wrong()
            pytest.fail(f"call {number} is taken")


def test_the_first_calls_of_every_test_are_looked_at():
    process, x, u = DiscreteVP(), torch.ones(B, 4), torch.full((B,), 0.5)
    for _ in range(shapes_held.CHECKS // 2 + 1):
        process.perturb(x, x, u)
    process.perturb(x, x[0], u)  # as its shapes are not looked at any more
    assert DiscreteVP.perturb.__no_type_check__
    shapes_held.begin()
    with pytest.raises(TypeCheckError):
        process.perturb(x, x[0], u)
