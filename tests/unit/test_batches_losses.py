"""Batches of groups by their properties; losses against sentence-transformers, scikit-learn, or by hand."""

import itertools
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MultipleNegativesRankingLoss

from cachelora.config import Train
from cachelora.files import write_table
from cachelora.models import load_model
from cachelora.schemas import TRIPLETS
from cachelora.train.batches import BalancedSampler, GroupCollator, read_items
from cachelora.train.losses import LOSSES, compare
from cachelora.train.trainer import GroupLoss
from cachelora.train.validation import read_validation


def members_of(sizes):
    found, first = {}, 0
    for number, size in enumerate(sizes):
        found[str(number)] = range(first, first + size)
        first += size
    return found


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 2), st.integers(0, 3))
@settings(deadline=None)
def test_batches_are_full_hold_nothing_twice_and_balance_domains(sizes, quarter, processes, seed):
    assume(sum(sizes) >= 2)
    sampler = BalancedSampler(members_of(sizes), 4 * quarter, seed, processes)
    parts = list(sampler)
    assert len(parts) == len(sampler)
    assert len(parts) % processes == 0
    whole = min(4 * quarter, sum(sizes)) // processes * processes
    batches = [[*itertools.chain(*parts[start : start + processes])] for start in range(0, len(parts), processes)]
    for batch in batches:
        assert len(batch) == len(set(batch)) == whole
    drawn = Counter(number for batch in batches for number in batch)
    wanted = {name: min(max(sizes), 4 * len(numbers)) for name, numbers in members_of(sizes).items()}
    assert sum(wanted.values()) - drawn.total() < whole
    if max(wanted.values()) <= len(batches):
        assert max(drawn.values()) <= 5
    if max(sizes) == min(sizes):
        assert max(drawn.values()) == 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0, 1), st.floats(0.01, 1), st.integers(0, 3))
@settings(deadline=None)
def test_a_power_of_its_size_says_how_much_a_domain_gives(sizes, exponent, share, seed):
    assume(sum(sizes) >= 2)
    members = members_of([*sizes, 30])
    replayed = str(len(sizes))
    sampler = BalancedSampler(members, 4, seed, size_exponent=exponent, replayed={replayed: share})
    batches = list(sampler)
    assert len(batches) >= 1
    assert all(len(batch) == len(set(batch)) for batch in batches)
    wanted = {
        str(n): min(round(max(sizes) * (size / max(sizes)) ** exponent), 4 * size) for n, size in enumerate(sizes)
    }
    wanted[replayed] = math.ceil(share * 30)
    total = sum(map(len, batches))
    assert 0 <= sum(wanted.values()) - total < 4
    if max(wanted.values()) <= len(batches):
        drawn = Counter(number for batch in batches for number in batch)
        for name, numbers in members.items():
            # What is left over at the end may be of one domain.
            assert abs(sum(drawn[number] for number in numbers) - wanted[name]) <= 4


def test_by_their_sizes_every_group_comes_once():
    batches = list(BalancedSampler(members_of([40, 8]), 8, 1, size_exponent=1.0))
    assert sorted(itertools.chain(*batches)) == list(range(48))


def test_a_replayed_domain_gives_other_groups_each_epoch():
    seen = []
    for epoch in range(2):
        sampler = BalancedSampler(members_of([8, 80]), 4, 1, replayed={"1": 0.1})
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == 4
        seen.append({number for batch in batches for number in batch if number >= 8})
    assert len(seen[0]) == len(seen[1]) == 8
    assert seen[0] != seen[1]


def test_the_processes_share_the_batches_of_one():
    members = members_of([50, 13])
    one, two = list(BalancedSampler(members, 8, 5)), list(BalancedSampler(members, 8, 5, 2))
    assert [a + b for a, b in zip(two[::2], two[1::2], strict=True)] == one


def test_a_small_domain_is_spread_over_the_epoch():
    batches = list(BalancedSampler(members_of([240, 60]), 16, 1))
    assert len(batches) == 30
    shares = [sum(number >= 240 for number in batch) / 16 for batch in batches]
    assert all(0.1 < share < 0.9 for share in shares)


def test_epochs_differ_and_repeat_by_seed():
    orders = []
    for epoch in (0, 1, 0):
        sampler = BalancedSampler(members_of([60]), 8, 1)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]


def triplets_file(path, groups=6, rows=3, negatives=4):
    table = [
        (f"{path.stem} {g} paraphrase {r}", f"{path.stem} {g} query",
         [{"kind": "aspect", "text": f"{path.stem} {g} negative {n}", "source": "llm"} for n in range(negatives)],
         f"g{g}", "validation" if g == 0 else "train")
        for g in range(groups) for r in range(rows)
    ]  # fmt: skip
    write_table(path, pd.DataFrame(table, columns=TRIPLETS.names), TRIPLETS)
    return path


def test_items_are_groups_with_each_text_once(tmp_path):
    paths = {name: triplets_file(tmp_path / f"{name}.parquet") for name in ("a", "b")}
    items, members = read_items(paths, grouped=True, folder=tmp_path / "items")
    assert members == {"a": range(0, 5), "b": range(5, 10)}
    assert items["number"] == list(range(10))
    assert items[7]["group"] == "b g3"
    assert items[7]["texts"] == ["b 3 query", *(f"b 3 paraphrase {r}" for r in range(3))]
    assert items[7]["negatives"] == [f"b 3 negative {n}" for n in range(4)]


def test_without_grouping_each_row_is_an_item(tmp_path):
    items, members = read_items({"a": triplets_file(tmp_path / "a.parquet")}, grouped=False, folder=tmp_path / "items")
    assert members == {"a": range(15)}
    assert items[4]["texts"] == ["a 2 query", "a 2 paraphrase 1"]
    assert items[3]["group"] == items[4]["group"] == "a g2"


def test_validation_keeps_every_negative_and_stops_at_the_limit(tmp_path):
    path = triplets_file(tmp_path / "a.parquet")
    found = read_validation(path, 5)
    assert len(found) == len(found.drop_duplicates()) == 24
    assert "topic" not in set(found["kind"])
    assert set(found["anchor"]) == set(found["positive"]) == {"a 0 query", *(f"a 0 paraphrase {r}" for r in range(3))}
    table = pd.read_parquet(path).assign(split="validation")
    write_table(tmp_path / "b.parquet", table, TRIPLETS)
    found = read_validation(tmp_path / "b.parquet", 4)
    assert found["group"].unique().tolist() == ["g0", "g1", "g2", "g3"]
    topic = found[found["kind"] == "topic"]
    assert len(topic) == 18
    assert set(topic.loc[topic["group"] == "g2", "negative"]) == {"a 1 query"}


def test_texts_are_drawn_anew_each_epoch_without_repetition_and_sorted_by_length(tmp_path):
    items, members = read_items({"a": triplets_file(tmp_path / "a.parquet")}, grouped=True, folder=tmp_path / "items")
    sampler = BalancedSampler(members, 5, 1)
    collator = GroupCollator(lambda texts: {"input_ids": texts}, sampler, Train(equivalents=2, negatives=3), 1)
    seen = set()
    for epoch in range(12):
        sampler.set_epoch(epoch)
        batch = collator([items[number] for number in range(5)])
        texts, label = batch["text_input_ids"], batch["label"].tolist()
        assert [len(text) for text in texts] == sorted(len(text) for text in texts)
        assert len(set(texts)) == len(texts)
        assert Counter((n, role) for n, role, _ in label) == {(n, r): 2 + (r == 0) for n in range(5) for r in (0, 1)}
        assert len({digest for _, _, digest in label}) == len(texts)
        for text, (number, role, _) in zip(texts, label, strict=True):
            assert text.startswith(f"a {number + 1} ")
            assert ("negative" in text) == (role == 0)
        assert collator([items[number] for number in range(5)])["text_input_ids"] == texts
        seen |= set(texts)
    assert len(seen) == 5 * 8


ROLES = [(0, 1), (1, 0), (0, 1), (1, 1), (0, 0), (1, 1), (2, 1), (2, 1), (0, 0)]
LABEL = torch.tensor([(item, role, number) for number, (item, role) in enumerate(ROLES)])
PLAIN = Train(temperature=0.1, calibration=0)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(len(LABEL), 5, generator=generator)
    return embeddings, compare(embeddings, LABEL, None)


def test_pairs_are_what_their_labels_say():
    embeddings, cosines = batch()
    anchors = [0, 2, 3, 5, 6, 7]
    assert cosines.positive.nonzero().tolist() == [[0, 2], [1, 0], [2, 5], [3, 3], [4, 7], [5, 6]]
    assert cosines.hard.nonzero().tolist() == [[0, 4], [0, 8], [1, 4], [1, 8], [2, 1], [3, 1]]
    assert cosines.other.sum(dim=1).tolist() == [5, 5, 6, 6, 7, 7]
    expected = torch.nn.functional.cosine_similarity(embeddings[anchors].unsqueeze(1), embeddings, dim=2)
    torch.testing.assert_close(cosines.values, expected)


def test_a_text_of_two_groups_is_no_negative_of_itself():
    label = LABEL.clone()
    label[6, 2] = label[0, 2]
    cosines = compare(batch()[0], label, None)
    assert not cosines.other[0, 6]
    assert not cosines.other[4, 0]
    assert cosines.other.sum() == batch()[1].other.sum() - 2


def test_places_of_no_text_count_nowhere():
    embeddings, cosines = batch()
    padded = compare(torch.cat([embeddings, torch.zeros(2, 5)]), torch.cat([LABEL, torch.full((2, 3), -1)]), None)
    for name, loss in LOSSES.items():
        if name != "distillation":
            torch.testing.assert_close(loss(padded, PLAIN), loss(cosines, PLAIN))


def test_ranking_is_multiple_negatives_ranking_in_both_directions():
    generator = torch.Generator().manual_seed(2)
    left, right = torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    label = torch.tensor([(n % 6, 1, n) for n in range(12)])
    theirs = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=10, directions=("query_to_doc", "query_to_query"))
    expected = sum(theirs.compute_loss_from_embeddings(pair, None) for pair in ([left, right], [right, left])) / 2
    torch.testing.assert_close(LOSSES["ranking"](compare(torch.cat([left, right]), label, None), PLAIN), expected)


def test_ranking_by_hand_with_hardness_calibration_and_guide():
    _, cosines = batch()

    def by_hand(hardness, base, calibration=0.0):
        total = []
        hard = sum(math.exp(value / 0.1) for value in cosines.values[cosines.hard].tolist())
        for anchor, positive in cosines.positive.nonzero().tolist():
            row = cosines.values[anchor].tolist()
            rest = calibration * hard / len(cosines.values)
            for n, value in enumerate(row):
                if cosines.hard[anchor, n]:
                    rest += math.exp(value / 0.1 + hardness * value)
                elif cosines.other[anchor, n] and (base is None or base[anchor][n] < base[anchor][positive]):
                    rest += math.exp(value / 0.1)
            right = math.exp(row[positive] / 0.1)
            total.append(-math.log(right / (right + rest)))
        return np.mean(total)

    ranking = LOSSES["ranking"]
    assert float(ranking(cosines, PLAIN)) == pytest.approx(by_hand(0, None), rel=1e-4)
    calibrated = Train(temperature=0.1, calibration=3)
    assert float(ranking(cosines, calibrated)) == pytest.approx(by_hand(0, None, 3), rel=1e-4)
    hard = Train(temperature=0.1, hardness=5, calibration=0)
    assert float(ranking(cosines, hard)) == pytest.approx(by_hand(5, None), rel=1e-4)
    guide = torch.randn(len(LABEL), 5, generator=torch.Generator().manual_seed(9))
    guided = compare(batch()[0], LABEL, guide)
    found = float(ranking(guided, Train(temperature=0.1, guided=True, calibration=0)))
    assert found == pytest.approx(by_hand(0, guided.base.tolist()), rel=1e-4)
    assert found < float(ranking(cosines, PLAIN))


def test_cosent_is_that_of_sentence_transformers():
    _, cosines = batch()
    scores = torch.cat([cosines.values[cosines.positive], cosines.values[cosines.hard]])
    labels = torch.cat([torch.ones(int(cosines.positive.sum())), torch.zeros(int(cosines.hard.sum()))])
    theirs = CoSENTLoss(torch.nn.Identity(), scale=10, similarity_fct=lambda a, b: a)
    expected = theirs.compute_loss_from_embeddings([scores, scores], labels)
    torch.testing.assert_close(LOSSES["cosent"](cosines, PLAIN), expected)


def test_calibration_losses_by_hand():
    _, cosines = batch()
    positive, hard = cosines.values[cosines.positive].double().numpy(), cosines.values[cosines.hard].double().numpy()
    middle = (positive.mean() + hard.mean()) / 2
    expected = (
        np.log1p(np.exp(-(positive - middle) / 0.1)).mean() + np.log1p(np.exp((hard - middle) / 0.1)).mean()
    ) / 2
    assert float(LOSSES["bce"](cosines, PLAIN)) == pytest.approx(expected, rel=1e-5)
    far, near = 1 - positive[1 - positive > (1 - hard).min()], 1 - hard[1 - hard < (1 - positive).max()]
    expected = (np.square(far).sum() + np.square(np.maximum(0, 0.5 - near)).sum()) / (len(positive) + len(hard))
    assert float(LOSSES["online_contrastive"](cosines, PLAIN)) == pytest.approx(expected, rel=1e-5)


def test_distillation_measures_the_change_between_groups_only():
    embeddings, _ = batch()
    assert float(LOSSES["distillation"](compare(embeddings, LABEL, embeddings), PLAIN)) == 0
    moved = compare(embeddings, LABEL, torch.randn(len(LABEL), 5, generator=torch.Generator().manual_seed(3)))
    change = (moved.values - moved.base)[moved.other]
    assert float(LOSSES["distillation"](moved, PLAIN)) == pytest.approx(float((change**2).mean()))


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_the_loss_of_sorted_texts_has_the_gradient_of_plain_ones(base, mini_batch_size):
    texts = [f"text {n} {'word ' * (n % 4) * 6}" for n in range(len(LABEL))]
    model = load_model(base, None).eval()
    tokens = model.preprocess(texts)
    weight = next(p for name, p in model.named_parameters() if name.endswith("layer.5.output.dense.weight"))

    loss = GroupLoss(model, Train(temperature=0.1, calibration=0, mini_batch_size=mini_batch_size), None)(
        [tokens], LABEL
    )
    loss.backward()
    found = weight.grad.clone()
    model.zero_grad()
    plain = torch.cat([model(model.preprocess([text]))["sentence_embedding"] for text in texts])
    expected = LOSSES["ranking"](compare(plain, LABEL, None), PLAIN)
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, weight.grad, rtol=1e-3, atol=1e-5)
