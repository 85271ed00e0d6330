"""Specs say what is generated; generated weights answer questions without forming low-rank products."""

import json
import math

import pytest
import torch

from workbench.errors import RunError
from workbench.hypernetworks import GeneratedWeights, ParamSpec, Slot

WIDTH, RANK, CONDITIONS = 6, 2, 5
SLOTS = {
    "full": Slot("projection", (WIDTH, WIDTH), "full"),
    "lowrank": Slot("projection", (WIDTH, WIDTH), "lowrank", RANK),
    "vector": Slot("projection", (WIDTH,), "vector"),
}


def generated(slot: Slot, seed: int = 0) -> GeneratedWeights:
    spec = ParamSpec((slot,))
    draw = torch.Generator().manual_seed(seed)
    return spec.compose(torch.randn(CONDITIONS, spec.numel, generator=draw))


def formed(weights: GeneratedWeights) -> torch.Tensor:
    """Every condition's weight without the identity, written out by plain loops over the rank."""
    slot = weights.spec.slots[0]
    if slot.mode != "lowrank":
        return weights.tensors[slot.name].reshape(len(weights), -1)
    down, up = weights.tensors[f"{slot.name}.down"], weights.tensors[f"{slot.name}.up"]
    outer = [down[:, :, k, None] * up[:, k, None, :] for k in range(slot.rank)]
    return sum(outer).reshape(len(weights), -1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (4,), "mode": "full"}, "cannot have shape"),
        ({"shape": (4, 4), "mode": "vector"}, "cannot have shape"),
        ({"shape": (4, 0), "mode": "full"}, "cannot have shape"),
        ({"shape": (4, 4), "mode": "lowrank"}, "rank goes with mode 'lowrank'"),
        ({"shape": (4, 4), "mode": "full", "rank": 2}, "rank goes with mode 'lowrank'"),
        ({"shape": (4, 3), "mode": "lowrank", "rank": 4}, "rank must lie in 1..3"),
        ({"shape": (4, 3), "mode": "lowrank", "rank": 0}, "rank must lie in 1..3"),
        ({"shape": (4, 3), "mode": "full", "identity": True}, "only a square matrix"),
        ({"shape": (4,), "mode": "vector", "identity": True}, "only a square matrix"),
    ],
)
def test_a_slot_that_cannot_act_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=f"slot gate: .*{message}"):
        Slot("gate", **arguments)


def test_the_largest_possible_rank_is_allowed():
    assert Slot("gate", (4, 3), "lowrank", 3).rank == 3


def test_a_spec_refuses_to_generate_nothing_or_one_name_twice():
    with pytest.raises(ValueError, match="at least one slot"):
        ParamSpec(())
    with pytest.raises(ValueError, match="no name twice"):
        ParamSpec((Slot("a", (2,), "vector"), Slot("a", (3,), "vector")))


def test_coefficients_are_counted_by_hand():
    spec = ParamSpec((Slot("q", (5,), "vector"), Slot("w", (4, 3), "full"), Slot("p", (4, 3), "lowrank", 2)))
    assert spec.numel == 5 + 4 * 3 + (4 * 2 + 2 * 3)


def test_coefficients_are_cut_in_slot_order_and_brought_to_each_slots_scale():
    spec = ParamSpec(
        (
            Slot("query", (3,), "vector", gain=2.0),
            Slot("gate", (4, 2), "full", gain=3.0),
            Slot("projection", (4, 2), "lowrank", 2, gain=5.0),
        )
    )
    plain = torch.arange(2 * spec.numel, dtype=torch.float32).reshape(2, -1)
    tensors = spec.compose(plain).tensors
    # 3 numbers of the vector, then 4 x 2 of the matrix, then the factors 4 x 2 and 2 x 2: 23 in all.
    expected = {
        "query": plain[:, :3].reshape(2, 3) * 2.0,
        "gate": plain[:, 3:11].reshape(2, 4, 2) * 3.0 / 2.0,  # gain / sqrt(4)
        "projection.down": plain[:, 11:19].reshape(2, 4, 2) / 2.0,  # 1 / sqrt(4)
        "projection.up": plain[:, 19:23].reshape(2, 2, 2) * 5.0 / math.sqrt(2),  # gain / sqrt(rank)
    }
    assert list(tensors) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(tensors[name], value)


def test_an_unscaled_spec_keeps_the_coefficients_as_they_are():
    spec = ParamSpec((SLOTS["lowrank"],), scaled=False)
    plain = torch.randn(3, spec.numel)
    tensors = spec.compose(plain).tensors
    assert torch.equal(torch.cat([part.flatten(1) for part in tensors.values()], dim=1), plain)


def test_a_spec_survives_json():
    spec = ParamSpec((Slot("query", (3,), "vector", gain=0.5), SLOTS["lowrank"]), scaled=False)
    assert ParamSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_a_spec_of_an_unknown_version_is_refused(version):
    content = {**ParamSpec((SLOTS["full"],)).to_dict(), "version": version}
    with pytest.raises(RunError, match=f"version {version}.*reads 1"):
        ParamSpec.from_dict(content)


def test_a_spec_without_a_version_is_refused():
    content = ParamSpec((SLOTS["full"],)).to_dict()
    del content["version"]
    with pytest.raises(RunError, match="version None"):
        ParamSpec.from_dict(content)


def test_asking_for_an_unknown_slot_lists_those_there_are():
    with pytest.raises(KeyError, match="no slot 'gate'; there are: projection"):
        generated(SLOTS["full"]).slot("gate")


@pytest.mark.parametrize("mode", SLOTS)
def test_norms_distances_and_inner_products_are_those_of_the_formed_matrices(mode):
    weights = generated(SLOTS[mode])
    flat = formed(weights).double().numpy()
    inner = flat @ flat.T
    # The loops over the rank in single precision; a distance of zero is a root of a rounding error.
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(weights.inner_products("projection"), torch.tensor(inner), **close)
    norms = [math.sqrt((row * row).sum()) for row in flat]
    torch.testing.assert_close(weights.norms("projection"), torch.tensor(norms), **close)
    distances = [[math.sqrt(((one - other) ** 2).sum()) for other in flat] for one in flat]
    torch.testing.assert_close(weights.distances("projection"), torch.tensor(distances), **close)


def test_close_weights_keep_their_small_distance():
    step = torch.full((500,), 1e-4)
    base = torch.randn(500, generator=torch.Generator().manual_seed(0))
    table = torch.stack([base, base + step])
    exact = (table[1].double() - table[0].double()).norm()
    # Single-precision inner products would be off by more than the distance itself.
    assert float(vectors(table).distances("v")[0, 1]) == pytest.approx(float(exact), rel=1e-3)


def test_one_matrix_is_formed_as_it_acts():
    plain, low = generated(SLOTS["full"]), generated(SLOTS["lowrank"])
    assert torch.equal(plain.matrix("projection", 3), plain.tensors["projection"][3])
    torch.testing.assert_close(low.matrix("projection", 3).flatten(), formed(low)[3])
    assert generated(SLOTS["vector"]).matrix("projection", 2).shape == (1, WIDTH)


def test_the_identity_is_part_of_the_acting_matrix_but_not_of_its_norm():
    slot = Slot("projection", (WIDTH, WIDTH), "lowrank", RANK, identity=True)
    with_identity, without = generated(slot), generated(SLOTS["lowrank"])
    difference = with_identity.matrix("projection", 1) - without.matrix("projection", 1)
    # Rounding of 1 + w in single precision.
    torch.testing.assert_close(difference, torch.eye(WIDTH), rtol=0, atol=1e-6)
    assert torch.equal(with_identity.norms("projection"), without.norms("projection"))


def vectors(rows: list[list[float]] | torch.Tensor) -> GeneratedWeights:
    values = torch.as_tensor(rows)
    spec = ParamSpec((Slot("v", (values.shape[1],), "vector"),))
    return GeneratedWeights(spec, {"v": values})


def test_effective_rank_is_one_when_conditions_move_the_weights_along_one_line():
    # Centred on (5, 0, 0): -1, 0 and 1 along one axis, so one singular value, entropy 0, exp 1.
    # 1e-6: idle directions have the root of a rounding error.
    assert vectors([[4.0, 0, 0], [5.0, 0, 0], [6.0, 0, 0]]).effective_rank("v") == pytest.approx(1, abs=1e-6)


def test_effective_rank_is_one_for_many_conditions_on_a_line_far_from_the_origin():
    draw = torch.Generator().manual_seed(0)
    base, step = torch.randn(2, 500, generator=draw)
    line = base + torch.linspace(-1, 1, 64)[:, None] * step
    # 1e-3: rounding of the single-precision weights themselves, over 62 idle directions.
    assert vectors(line).effective_rank("v") == pytest.approx(1, abs=1e-3)


def test_effective_rank_counts_equally_strong_directions():
    # Centred already; singular values sqrt(2), sqrt(2): entropy log 2, exp 2.
    cross = [[1.0, 0], [-1.0, 0], [0, 1.0], [0, -1.0]]
    assert vectors(cross).effective_rank("v") == pytest.approx(2, abs=1e-6)


def test_effective_rank_weighs_directions_by_their_strength():
    # Singular values 3 sqrt(2) and sqrt(2), shares 3/4 and 1/4: exp of 0.75 log(4/3) + 0.25 log 4 = 1.7548.
    cross = [[3.0, 0], [-3.0, 0], [0, 1.0], [0, -1.0]]
    expected = math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert vectors(cross).effective_rank("v") == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mode", SLOTS)
def test_effective_rank_is_zero_when_no_condition_moves_the_weights(mode):
    spec = ParamSpec((SLOTS[mode],))
    weights = spec.compose(torch.randn(1, spec.numel).expand(7, -1))
    assert weights.effective_rank("projection") == 0.0


def test_drift_is_the_mean_squared_distance_over_conditions_worked_out_by_hand():
    spec = ParamSpec((Slot("a", (2,), "vector"), Slot("b", (1,), "vector")))
    kept = spec.compose(torch.tensor([[1.0, 2, 3], [0, 0, 0]]))
    now = spec.compose(torch.tensor([[1.0, 4, 3], [1, 0, 3]], requires_grad=True))
    # Condition 0: 2^2 = 4; condition 1: 1 + 3^2 = 10; mean 7.
    assert float(now.drift_from(kept).detach()) == 7
    assert now.drift_from(kept).requires_grad
    assert kept.drift_from(kept) == 0


@pytest.mark.parametrize("mode", ["full", "vector"])
def test_drift_is_the_squared_frobenius_distance_where_nothing_is_factored(mode):
    one, other = generated(SLOTS[mode], 0), generated(SLOTS[mode], 1)
    both = GeneratedWeights(
        one.spec, {"projection": torch.cat([one.tensors["projection"], other.tensors["projection"]])}
    )
    distances = both.distances("projection")[:CONDITIONS, CONDITIONS:].diagonal()
    # The distances come from double precision, the drift from single.
    assert float(one.drift_from(other)) == pytest.approx(float(distances.square().mean()), rel=1e-5)


def test_the_number_of_conditions_is_the_length():
    assert len(generated(SLOTS["lowrank"])) == CONDITIONS
