"""Plan: which samples a step has, who answers for them, and which states are learned from."""
from conftest import *

ROUTES = [dict(teacher='a', data='x', weight=1.0), dict(teacher='b', data='y', weight=3.0)]


def planned(step=0, seed=0, routes=ROUTES, sizes=(50, 70), batch=16, per_step='all', group=1,
            rank=0, size=1, updates=1, **more):
    """A plan of rows that are their own numbers."""
    routes = [dict(size=(8, 8), **r) for r in routes]
    c = SimpleNamespace(seed=seed, routes=routes, batch_size=batch, routes_per_step=per_step,
                        group_size=group, updates=updates)
    buckets = {r['data']: range(n) for r, n in zip(routes, sizes)}
    return T.plan(step, c, buckets, SimpleNamespace(rank=rank, size=size), **more)


def plain(samples):
    return [{k: v for k, v in vars(s).items() if k not in ('noise', 'draws')} for s in samples]


def streams(s):
    return [torch.randn(2, generator=g).tolist() for g in (s.noise, s.draws)]


def route_of(s):
    return 'xy'.index(s.label)


def shares(samples):
    return [sum(s.share for s in samples if route_of(s) == r) for r in (0, 1)]


@pytest.mark.parametrize('per_step', [1, 'all', 'sample'])
def test_a_plan_depends_on_seed_and_step_alone(per_step):
    def one(step, seed):
        return plain(planned(step, seed, per_step=per_step, group=2))
    first = one(3, 0)
    random.seed(7)
    torch.manual_seed(7)
    assert one(3, 0) == first and one(4, 0) != first and one(3, 1) != first
    assert all(0 <= s['row'] < dict(x=50, y=70)[s['label']] for s in first)
    for a, b in zip(first[0::2], first[1::2]):
        assert (a['group'], a['row'], a['label']) == (b['group'], b['row'], b['label'])
    assert len({s['row'] for s in first}) > 1 and [s['number'] for s in first] == [*range(16)]


@pytest.mark.parametrize('same', [False, True])
def test_each_step_and_seed_has_noise_and_rows_of_its_own(same):
    seen = [str(x) for step, seed in ((3, 0), (4, 0), (3, 1))
            for s in planned(step, seed, same_noise=same) for x in streams(s)]
    assert len(set(seen)) == len(seen) == 96
    rows = [[s.row for s in planned(step)] for step in (3, 4)]
    assert rows[0] != rows[1]


def test_each_step_draws_queries_of_its_own():
    c = SimpleNamespace(queries=1, query='uniform', query_in='steps', steps=16, drop_last=0, seed=0)
    samples = [SimpleNamespace(step=i, number=0, slot=0, of=1) for i in range(400)]
    assert {T.draw_queries(s, c, shifted(1.0, 16))[0] for s in samples} == {*range(16)}


def test_any_number_of_processes_takes_the_same_samples():
    def taken(size):
        got = []
        for rank in range(size):
            mine = planned(2, 5, sizes=(40, 40), batch=24, per_step='sample', group=2, rank=rank,
                           size=size)
            assert all(a.group == b.group for a, b in zip(mine[0::2], mine[1::2]))
            assert len(mine) == 24 // size
            got += [(s.number, s.label, s.row, s.share, *streams(s)) for s in mine]
        return sorted(got)
    assert taken(1) == taken(2) == taken(3) == taken(12)
    assert len({str(x) for s in taken(1) for x in s[4:]}) == 48        # all streams differ


def test_a_group_may_start_from_one_noise():
    for same in (False, True):
        a, b = map(streams, planned(group=2, same_noise=same)[:2])
        assert (a[0] == b[0]) == same and a[1] != b[1]


def test_routes_of_a_step():
    one, every, free = ([planned(i, per_step=k) for i in range(400)] for k in (1, 'all', 'sample'))
    assert all(len({s.label for s in p}) == 1 for p in one)
    assert sum(route_of(p[0]) for p in one) / 400 == pytest.approx(0.75, abs=0.07)
    assert sum(route_of(s) for p in free for s in p) / 6400 == pytest.approx(0.75, abs=0.02)
    assert {s.row for p in free for s in p if route_of(s) == 0} == {*range(50)}    # all its rows
    assert all([route_of(s) for s in p] == [0] * 8 + [1] * 8 for p in every)
    assert all(s.share == 1 / 16 for p in one[:20] + free[:20] for s in p)
    for p in every[:20]:                                       # by weight, not by samples
        assert shares(p) == pytest.approx([0.25, 0.75])
    given = [dict(ROUTES[0], samples=4), dict(ROUTES[1], samples=12)]
    p = planned(routes=given, group=2)
    assert [route_of(s) for s in p] == [0] * 4 + [1] * 12
    assert shares(p) == pytest.approx([0.25, 0.75])
    assert [s.slot for s in p] == [*range(4), *range(12)]
    assert [s.of for s in p] == [4] * 4 + [12] * 12


@pytest.mark.parametrize('per_step', ['all', 'sample', 1])
@pytest.mark.parametrize('updates', [1, 2, 4])
def test_processes_share_each_update(updates, per_step):
    """Whatever their number, together they have the same samples, each as many of every update."""
    given = [dict(ROUTES[0], samples=8), dict(ROUTES[1], samples=24)]

    def dealt(size):
        mine = [planned(5, routes=given, batch=32, per_step=per_step, group=2, rank=rank, size=size,
                        updates=updates) for rank in range(size)]
        of = [[[s for s in m if s.update == u] for u in range(updates)] for m in mine]
        assert {len(some) for m in of for some in m} == {32 // updates // size}
        return [sorted((s.number, s.row) for m in of for s in m[u]) for u in range(updates)]
    assert dealt(1) == dealt(2) == dealt(4)


@pytest.mark.parametrize('updates', [1, 2])
def test_every_update_has_the_shares_that_the_weights_say(updates):
    given = [dict(ROUTES[0], samples=8), dict(ROUTES[1], samples=24)]
    p = planned(3, routes=given, batch=32, group=4, updates=updates)
    for u in range(updates):
        some = [s for s in p if s.update == u]
        assert len(some) == 32 // updates
        assert [updates * x for x in shares(some)] == pytest.approx([0.25, 0.75])
        assert len({s.group for s in some}) == len(some) // 4           # groups stay whole
    assert all(s.update == 0 for s in planned(group=4, updates=2, batch=32, per_step=1)[:4])


@pytest.mark.parametrize('samples, nearest', [((4, 12), '8, 16'), ((2, 14), '8, 16'),
                                              ((6, 10), '8, 8')])
def test_samples_that_no_update_can_share_are_refused(samples, nearest, world, tmp_path):
    routes = [dict(teacher='one', data='words', samples=samples[0]),
              dict(teacher='two', data='edits', samples=samples[1])]
    with pytest.raises(BadInput, match='multiples of group_size x updates = 8.*the nearest: '
                       f'.{nearest}'):
        world.distil(tmp_path / 'x', method='flowopd', eta=0.7, group_size=4, updates=2,
                     batch_size=16, routes=routes)


def test_a_batch_that_does_not_divide_says_what_would(world, tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    with pytest.raises(BadInput, match='batch_size = 10 does not divide .* nearest .* is 8'):
        T.main(world.opd(tmp_path / 'x', batch_size=10))
    with pytest.raises(BadInput, match='batch_size = 12 does not divide .* nearest .* is 16'):
        train_teacher.main(world.teacher(tmp_path / 'x', method='grpo', group_size=4,
                                         batch_size=12))


# -------------------- queries
def drawn(rule, k=1, steps=16, n=3000, drop_last=0, place='steps', sigmas=None):
    """[step numbers of a sample], many times; each sample is alone on its route."""
    c = SimpleNamespace(queries=k, query=rule, query_in=place, steps=steps, drop_last=drop_last,
                        seed=0)
    sigmas = sigmas or shifted(1.0, steps)
    return [T.draw_queries(SimpleNamespace(step=0, number=i, slot=0, of=1), c, sigmas)
            for i in range(n)]


def shifted(shift, n):
    even = [1 - i / n for i in range(n + 1)]
    return [shift * x / (1 + (shift - 1) * x) for x in even]


def mean_of(rule):
    return sum(i for x in drawn(rule) for i in x) / 3000


def test_each_rule_has_its_own_mean():
    """Of Beta(a, b) on 16 steps: 16 a / (a + b) - 1/2, but for what the ends cut."""
    assert mean_of('low_noise') == pytest.approx(10.93, abs=0.2)
    assert mean_of('mid_noise') == pytest.approx(7.5, abs=0.2)
    assert mean_of('high_noise') == pytest.approx(4.07, abs=0.2)
    assert mean_of('uniform') == pytest.approx(7.5, abs=0.35)
    assert mean_of('stratified') == pytest.approx(7.5, abs=0.35)


@pytest.mark.parametrize('rule', T.QUERIES)
def test_queries_are_distinct_and_in_their_order(rule):
    for k in (2, 6, 16 if rule in ('uniform', 'stratified') else 9):
        for x in drawn(rule, k, n=40):
            assert x == sorted(set(x)) and len(x) == k and 0 <= x[0] and x[-1] < 16


@pytest.mark.parametrize('rule', T.QUERIES)
def test_all_steps_are_one_choice_and_not_waited_for(rule):
    assert drawn(rule, 50, 50, n=3) == [[*range(50)]] * 3


@pytest.mark.parametrize('rule, mean', [('low_noise', 2 / 7), ('mid_noise', 0.5),
                                        ('high_noise', 5 / 7), ('uniform', 0.5),
                                        ('stratified', 0.5)])
def test_in_sigma_a_rule_means_the_same_noise_at_any_shift(rule, mean):
    """u is where 1 - sigma is. In steps, a shift of 3 makes low noise of .26 in the median .52."""
    for shift in (1.0, 3.0):
        sigmas = shifted(shift, 200)
        found = [sigmas[i] for x in drawn(rule, 1, 200, 1500, place='sigma', sigmas=sigmas)
                 for i in x]
        assert sum(found) / len(found) == pytest.approx(mean, abs=0.03)
    in_steps = sorted(sigmas[i] for x in drawn('low_noise', 1, 200, 1500) for i in x)
    assert in_steps[750] == pytest.approx(0.52, abs=0.03)


def test_in_sigma_the_nearest_step_is_taken_and_none_twice(monkeypatch):
    sigmas = [1.0, 0.9, 0.6, 0.1, 0.0]
    for u, step in ((0.0, 0), (0.07, 1), (0.35, 2), (0.8, 3), (1.0, 3)):
        monkeypatch.setitem(T.QUERIES, 'at', lambda r, even: u)
        assert drawn('at', 1, 4, 1, place='sigma', sigmas=sigmas) == [[step]]
    assert drawn('at', 2, 4, 1, place='sigma', sigmas=sigmas) == [[2, 3]]
    assert drawn('at', 2, 4, 1, drop_last=1, place='sigma', sigmas=sigmas) == [[1, 2]]


def frequencies(rule, k, n, draws=10000):
    counts = torch.zeros(n)
    for x in drawn(rule, k, n, draws):
        counts[x] += 1
    return (counts / draws).tolist()


def without_replacement(p, k):
    """Inclusion probabilities when what was taken is drawn again, of single draws of odds p."""
    total = [0.0] * len(p)
    for order in itertools.permutations(range(len(p)), k):
        chance, left = 1.0, 1.0
        for i in order:
            chance, left = chance * p[i] / left, left - p[i]
        for i in order:
            total[i] += chance
    return total


def test_what_is_taken_is_drawn_again():
    assert frequencies('uniform', 2, 4) == pytest.approx([0.5] * 4, abs=0.018)
    assert frequencies('uniform', 3, 4) == pytest.approx([0.75] * 4, abs=0.018)
    one = frequencies('low_noise', 1, 4)
    two = frequencies('low_noise', 2, 4)
    assert two == pytest.approx(without_replacement(one, 2), abs=0.02)


@pytest.mark.parametrize('k, n', [(1, 4), (2, 4), (2, 5), (3, 4), (3, 7)])
def test_stratified_queries_include_each_step_equally(k, n):
    assert frequencies('stratified', k, n) == pytest.approx([k / n] * n, abs=0.018)


@pytest.mark.parametrize('rule', T.QUERIES)
def test_the_last_steps_are_left_out(rule):
    """The others are drawn as if there were no more."""
    assert drawn(rule, steps=5, drop_last=1) == drawn(rule, steps=4)
    assert drawn(rule, 3, 5, 5, drop_last=2) == [[0, 1, 2]] * 5


@pytest.mark.parametrize('k, of', [(1, 16), (2, 8), (1, 32)])
def test_stratified_queries_spread_over_a_routes_samples(k, of):
    c = SimpleNamespace(queries=k, query='stratified', query_in='steps', steps=16, drop_last=0,
                        seed=0)
    samples = [SimpleNamespace(step=0, number=i, slot=i, of=of) for i in range(of)]
    seen = [i for s in samples for i in T.draw_queries(s, c, shifted(1.0, 16))]
    assert sorted(seen) == sorted([*range(16)] * (k * of // 16))


def ends(r, even):
    return round(r.random())


def test_a_rule_without_enough_steps_is_refused_and_not_waited_for(monkeypatch):
    monkeypatch.setitem(T.QUERIES, 'ends', ends)
    assert frequencies('ends', 1, 9, 2000) == pytest.approx([0.5] + [0] * 7 + [0.5], abs=0.05)
    assert drawn('ends', 2, 9, 20) == [[0, 8]] * 20
    began = time.time()
    with pytest.raises(BadInput, match="query = 'ends' has no 3 distinct steps"):
        drawn('ends', 3, 9, 1)
    assert time.time() - began < 10
