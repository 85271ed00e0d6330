"""Federated learning: no sample reaches a server, the server's step by hand, and what averages average."""

import inspect
import typing
from collections.abc import Iterator

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from workbench.datasets.digits import load_digits
from workbench.errors import RecipeError, RunError
from workbench.families import federation
from workbench.families.adaptation import copies
from workbench.families.federated import CLIENTS, NEW, SAMPLES, clients_of, measure
from workbench.families.federation import Averaging, Clients, HyperServer, Update, network, run_rounds
from workbench.hypernetworks import Conditioned, MLPGenerator, ParamSpec
from workbench.papers import load_recipe
from workbench.training import seed_everything

MODELS = [
    {"name": "local", "kind": "averaging", "over": "nobody"},
    {"name": "fedavg", "kind": "averaging", "over": "all"},
    {"name": "fedavg_tuned", "kind": "averaging", "over": "all", "tune": 10},
    {"name": "told", "kind": "averaging", "over": "group"},
    {"name": "pfedhn", "kind": "hyper"},
]
CHANGES = {
    "seeds": [0], "models": MODELS, "reference": "local", "bars": [], "published": [],
    "rounds": 12, "new_rounds": 5, "local_steps": 3, "hidden": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("family_federated", CHANGES)


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def sides(digits):
    return clients_of(digits, 0, 0.1)


def hyper_server(learn=True):
    torch.manual_seed(0)
    target = network()
    task = Conditioned(target, MLPGenerator(4, ParamSpec.of(target), (8,), unit=True))
    return HyperServer(task, torch.randn(CLIENTS, 4), 0.01, learn=learn)


def servers():
    groups = torch.arange(CLIENTS) % 4
    return [hyper_server(), Averaging(copies(network(), 4), groups)]


def tensors_within(thing: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that can be reached from an object, through attributes, containers and closures."""
    if id(thing) in seen or isinstance(thing, (str, int, float, type)) or inspect.ismodule(thing):
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
        return
    parts = list(getattr(thing, "__dict__", {}).values())
    if isinstance(thing, dict):
        parts += [*thing.keys(), *thing.values()]
    elif isinstance(thing, (list, tuple, set, frozenset)):
        parts += list(thing)
    elif inspect.isfunction(thing):
        parts += [cell.cell_contents for cell in thing.__closure__ or ()]
    elif inspect.ismethod(thing):
        parts.append(thing.__self__)
    for part in parts:
        yield from tensors_within(part, seen)


def holds(thing: object, clients: Clients) -> bool:
    """Tell whether a tensor within shares memory with a client's samples, or has one of them as a row."""
    for found in tensors_within(thing, set()):
        for own in (clients._images, clients._labels):
            if found.untyped_storage().data_ptr() == own.untyped_storage().data_ptr():
                return True
        rows = found.detach().flatten(0, -2) if found.ndim > 1 else found[None]
        if rows.shape[-1] == clients._images.shape[-1]:
            images = clients._images.flatten(0, 1)
            if bool((rows[:, None] == images[None]).all(-1).any()):
                return True
    return False


# --- the two sides ------------------------------------------------------------------------------------------


def test_no_sample_can_be_reached_from_a_server_after_rounds(digits):
    (clients, test), _ = sides(digits)
    for server in servers():
        run_rounds(server, clients, test, 2, 2)
        assert not holds(server, clients)
        assert not holds(server, test)


def test_the_search_for_samples_would_find_them(digits):
    (clients, _), _ = sides(digits)
    for server in servers():
        server.kept = {"by mistake": [clients._images[3:4].clone()]}
        assert holds(server, clients)
        server.kept = lambda: clients
        assert holds(server, clients)


def test_what_a_server_takes_and_gives_names_no_type_that_holds_samples():
    for server in (HyperServer, Averaging, federation.Server):
        takes = typing.get_type_hints(server.receive)
        assert takes == {"update": Update, "return": type(None)}
        assert typing.get_type_hints(server.send) == {"return": federation.Stacked}
        starts = typing.get_type_hints(server.__init__).values()
        assert Clients not in starts
    assert typing.get_type_hints(Update) == {"change": federation.Stacked}


@pytest.mark.parametrize("which", [0, 1])
def test_a_server_refuses_everything_but_changes_of_the_weights_it_sent(digits, which):
    (clients, _), _ = sides(digits)
    server = servers()[which]
    sent = server.send()
    right = clients.train(sent, 1)
    wrong = [
        {"images": clients._images},
        {**right.change, "images": clients._images},
        {**right.change, "0.weight": clients._images},
        {name: one[:3] for name, one in right.change.items()},
        {},
    ]
    for change in wrong:
        with pytest.raises(RunError, match="a server takes changes of the weights it sent"):
            server.receive(Update(change))
    server.receive(right)


def test_an_update_is_a_difference_of_weights_that_carries_no_history(digits):
    (clients, _), _ = sides(digits)
    sent = hyper_server().send()
    update = clients.train(sent, 2)
    assert {name: one.shape for name, one in update.change.items()} == {
        name: one.shape for name, one in sent.items()
    }
    assert all(one.grad_fn is None for one in update.change.values())
    trained = clients.tuned(sent, 2)
    for name, change in update.change.items():
        torch.testing.assert_close(change, sent[name] - trained[name])


# --- the servers --------------------------------------------------------------------------------------------


def test_the_hypernetworks_step_is_the_chain_rule_on_the_clients_changes(digits):
    (clients, _), _ = sides(digits)
    server = hyper_server()
    update = clients.train(server.send(), 2)
    # The gradient of sum(weights * change) with change held fixed is (d weights / d phi)' change.
    weights = server.task.parameters_of(server.task.weights(server.vectors))
    value = sum((one * update.change[name]).sum() for name, one in weights.items())
    expected = torch.autograd.grad(value, server.learned)
    server.receive(update)
    for parameter, slope in zip(server.learned, expected, strict=True):
        torch.testing.assert_close(parameter.grad, slope)


def test_with_one_local_step_the_hypernetwork_follows_the_gradient_of_the_clients_loss(digits):
    (clients, _), _ = sides(digits)
    server = hyper_server()
    server.receive(clients.train(server.send(), 1))
    found = [one.grad.clone() for one in server.learned]
    server = hyper_server()
    weights = server.task.parameters_of(server.task.weights(server.vectors))
    total = sum(
        cross_entropy(
            functional_call(
                clients._network,
                {name: one[client] for name, one in weights.items()},
                clients._images[client],
            ),
            clients._labels[client],
        )
        for client in range(CLIENTS)
    )
    # One step changes the weights by rate (0.1) times the gradient.
    for slope, expected in zip(found, torch.autograd.grad(total, server.learned), strict=True):
        torch.testing.assert_close(slope, 0.1 * expected, atol=1e-5, rtol=1e-3)


def test_a_round_moves_vectors_generator_and_target_and_new_clients_move_their_vectors_alone(digits):
    (clients, test), _ = sides(digits)
    for learn in (True, False):
        server = hyper_server(learn)
        before = {name: one.clone() for name, one in server.state_dict().items()}
        run_rounds(server, clients, test, 2, 1)
        after = server.state_dict()
        same = {name for name in before if torch.equal(before[name], after[name])}
        assert same == (set() if learn else before.keys() - {"vectors"})


def test_another_vector_gives_other_weights():
    sent = hyper_server().send()
    assert all(not torch.equal(one[0], one[1]) for one in sent.values())


def test_averages_by_hand():
    weights = {"w": torch.tensor([[0.0], [10.0]])}
    server = Averaging(weights, torch.tensor([0, 0, 1]))
    assert server.send()["w"].tolist() == [[0.0], [0.0], [10.0]]
    server.receive(Update({"w": torch.tensor([[1.0], [3.0], [5.0]])}))
    # 0 - (1 + 3) / 2 = -2 and 10 - 5 = 5.
    assert server.send()["w"].tolist() == [[-2.0], [-2.0], [5.0]]
    assert weights["w"].tolist() == [[0.0], [10.0]]


def test_averaging_over_nobody_is_training_alone(digits):
    (clients, test), _ = sides(digits)
    start = copies(network(), CLIENTS)
    server = Averaging(start, torch.arange(CLIENTS))
    run_rounds(server, clients, test, 3, 2)
    alone = clients.tuned({name: one.detach() for name, one in start.items()}, 6)
    for name, one in server.send().items():
        torch.testing.assert_close(one, alone[name], atol=1e-5, rtol=1e-4)


# --- the data and the comparison ----------------------------------------------------------------------------


def test_clients_hold_digits_of_their_own_and_groups_name_them_alike(digits):
    (clients, test), (new, _) = sides(digits)
    images = torch.cat([clients._images, new._images]).flatten(0, 1)
    assert images.shape == ((CLIENTS + NEW) * SAMPLES, 64)
    assert len(images.unique(dim=0)) == len(images)  # no digit was dealt twice
    # Clients 0, 4, 8 ... share their names of the digits, clients 0 and 1 do not.
    assert torch.equal(test._labels[0], test._labels[4])
    assert not torch.equal(test._labels[0], test._labels[1])
    assert torch.equal(test._images[0], digits.inputs["test"])


@pytest.fixture(scope="module")
def outcomes(recipe, digits, tmp_path_factory):
    found = {}
    for model in recipe.models:
        seed_everything(0)
        found[model.name] = measure(recipe, digits, model, 0, tmp_path_factory.mktemp(model.name))
    return found


def test_every_row_learns_and_one_network_cannot_suit_all(outcomes):
    for name, found in outcomes.items():
        accuracy = found.curves["accuracy_by_round"][1]
        assert accuracy[-1] > accuracy[0] + (0.05 if name == "pfedhn" else 0.1)
    values = {name: found.values["accuracy"] for name, found in outcomes.items()}
    assert values["fedavg"] < values["fedavg_tuned"]
    assert values["fedavg"] < values["told"]


def test_tuning_is_all_that_sets_the_tuned_row_apart(outcomes):
    assert outcomes["fedavg"].curves == outcomes["fedavg_tuned"].curves
    assert outcomes["fedavg"].values != outcomes["fedavg_tuned"].values


def test_curve_and_card_say_when_and_at_what_cost(outcomes):
    assert outcomes["local"].curves["accuracy_by_round"][0] == [0.0, 10.0, 12.0]
    about = outcomes["pfedhn"].about
    # 64-32-10: 64 * 32 + 32 + 32 * 10 + 10 = 2,410; 24 vectors of 8; the target is learned as well.
    assert about["cost"]["generated_parameters"] == 2410
    assert about["parameters"] == about["cost"]["generator_parameters"] + 2410 + CLIENTS * 8
    assert about["health"]["conditions"] == CLIENTS
    assert outcomes["local"].about["parameters"] == 2410


def test_the_same_seed_gives_the_same_numbers(recipe, digits, outcomes, tmp_path):
    seed_everything(0)
    assert measure(recipe, digits, recipe.models[4], 0, tmp_path).values == outcomes["pfedhn"].values


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "averaging"}, "kind averaging needs over"),
        ({"kind": "hyper", "over": "all"}, "kind hyper has neither over nor tune"),
        ({"kind": "hyper", "tune": 5}, "kind hyper has neither over nor tune"),
        ({"kind": "averaging", "over": "most"}, "models.0.over"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(
            "family_federated", {**CHANGES, "models": [{"name": "wrong", **change}], "reference": "wrong"}
        )
