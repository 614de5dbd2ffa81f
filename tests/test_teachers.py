"""train_teacher.py: imitation, GRPO, SDPO."""
from conftest import *

TEACHERS = dict(sft=dict(method='sft', micro_batch=4),
                grpo=dict(method='grpo', group_size=2, updates=2, steps=4, kl_beta=0.01),
                sdpo=dict(method='sdpo', group_size=2, updates=2, steps=3, buffer=20))


# -------------------- what an action was worth
def combined(values, weights, group, clip=5.0):
    return train_teacher.combined_advantage(values, weights, group=group, clip=clip,
                                            stds=[None] * len(values))


def test_combined_advantage():
    a = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0])
    b = torch.tensor([300.0, 100.0, 200.0, 7.0, 7.0, 7.0])
    total, alive = combined([a, b], [1.0, 2.0], 3)
    assert total.tolist() == pytest.approx([1, -2, 1, 0, 0, 0], abs=1e-4)
    assert alive.tolist() == [True, False]
    total, _ = combined([a, b], [1.0, 2.0], 3, clip=0.5)
    assert total.tolist() == pytest.approx([.5, -.5, .5, 0, 0, 0])   # each clipped, then the sum
    _, alive = combined([torch.tensor([1.0, 1.0, 2.0, 1.0])], [1.0], 2)
    assert alive.tolist() == [False, True]
    against, alive = combined([torch.tensor([1.0, 2.0]), torch.tensor([5.0, 3.0])], [1.0, 1.0], 2)
    assert against.tolist() == [0, 0] and alive.tolist() == [True]     # it has rewards that differ


def test_extremes():
    advantage = torch.tensor([3.0, 1.0, 2.0, 0.0, 0.0, 7.0, 6.0, 5.0])

    def keep(n):
        return train_teacher.extremes(advantage, 4, n).int().tolist()
    assert keep(2) == [1, 0, 0, 1, 1, 1, 0, 0] and keep(3) == [1, 0, 1, 1, 1, 1, 1, 0]
    assert keep(4) == [1] * 8


def test_interpolate():
    """Two samples, four steps, pictures of two numbers; asked at the first and the last step."""
    x0 = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 1.0]],
                       [[1.0, 1.0], [5.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]]).view(4, 2, 2, 1, 1)
    asked, values = [torch.tensor([0, 0]), torch.tensor([3, 3])], [[1.0, 10.0], [2.0, 20.0]]
    r = train_teacher.interpolate(x0, asked, torch.tensor(values))
    want = torch.tensor([[1.0, 10.0], [1.0, 15.0], [1.5, 20.0], [2.0, 20.0]])
    torch.testing.assert_close(r, want)
    asked.insert(1, torch.tensor([2, 1]))
    r = train_teacher.interpolate(x0, asked, torch.tensor([values[0], [8.0, 30.0], values[1]]))
    half = 0.5 ** 0.5                                          # step 1 is like 0, and half like 2
    assert r[:, 0].tolist() == pytest.approx([1, (1 + half * 8) / (1 + half), 8, 2])
    assert r[:, 1].tolist() == pytest.approx([10, 30, (half * 30 + 20) / (1 + half), 20])


def test_returns():
    r = torch.tensor([[1.0, 0.0], [2.0, 0.0], [4.0, 8.0]])
    assert train_teacher.returns(r, 0.5).tolist() == [[3.0, 2.0], [4.0, 4.0], [4.0, 8.0]]


def test_sdpo_loss():
    logp_old, change = torch.tensor([0.3, -0.2, 0.0, 0.0]), torch.tensor([0.5, 0.1, 0.0, 0.3])
    logp, advantage = (logp_old + change).requires_grad_(), torch.tensor([1.0, 0.0, 0.0, 2.0])
    weight = torch.tensor([0.5, 0.5, 1.0, 1.0])
    loss = train_teacher.sdpo_loss(logp, logp_old, advantage, weight, 0.2)
    # (0.5 x 0.4 - 1)^2 = 0.64, clipped (0.5 x 0.1 - 1)^2 = 0.9025
    # (-0.3 + 2)^2 = 2.89, clipped (-0.2 + 2)^2 = 3.24
    assert loss.tolist() == pytest.approx([0.9025, 3.24])
    loss.sum().backward()
    assert logp.grad.tolist() == pytest.approx([0, 0.95, 3.6, 0], abs=1e-5)
    one = torch.tensor([1.0, 0.0])
    back = train_teacher.sdpo_loss(-0.5 * one, 0 * one, one, torch.ones(2), 0.2)
    assert back.tolist() == pytest.approx([2.25])              # the wrong way: nothing is clipped


def test_buffered():
    from support.judges import buffered
    batch, past = [1.0, 2.0, 3.0], [0.0] * 8 + [4.0] * 8
    assert buffered(4.0, past[:15], batch) == pytest.approx(2.0, abs=1e-5)
    assert buffered(4.0, past, batch) == pytest.approx(2 / (64 / 15) ** 0.5, abs=1e-5)
    nearly = torch.tensor([0.8, 0.8 + 1.2e-7] * 8).tolist()    # what rounding makes of one reward
    assert nearly[0] != nearly[1] and buffered(nearly[1], nearly, batch) == 0


def test_rounding_is_no_difference_of_a_pair():
    """All rewards equal: the returns that are interpolated from them differ by rounding alone."""
    whole, each = (torch.randn(n, 16, 4, 3, 3, generator=T.torch_rng(n)) for n in (1, 7))
    x0 = whole + 0.5 * each                                    # on the way to one picture
    asked = [torch.full((16,), i) for i in (0, 3, 6)]
    R = train_teacher.returns(train_teacher.interpolate(x0, asked, torch.full((3, 16), 0.8)), 0.99)
    pairs = R.unflatten(1, (-1, 2))
    assert (pairs[..., 0] != pairs[..., 1]).any() and not (~train_teacher.flat(pairs, 2)).any()
    assert (~train_teacher.flat(pairs + torch.tensor([0, 1e-4]), 2)).all()


@pytest.mark.parametrize('method', ['grpo', 'sdpo'])
def test_the_mean_gradient_is_that_of_the_expected_reward(method):
    """A bandit: actions of N(mu, 0.3), the reward minus their squared distance to a goal."""
    torch.manual_seed(0)
    mu, goal, n, std = torch.randn(8), torch.randn(8), 64000, torch.tensor(0.3)
    mean = mu.expand(n, 8).clone().requires_grad_()
    drawn = (mean + std * torch.randn(n, 8)).detach()
    logp, reward = T.log_prob(drawn, mean, std), -(drawn - goal).square().sum(1)
    if method == 'grpo':
        advantage, alive = combined([reward], [1.0], 16)
        loss = T.ppo_loss(logp, logp.detach(), advantage, 1e-4)[0]
        assert alive.all()
    else:
        advantage = ((reward - reward.mean()) / reward.std()).clamp(-5, 5)
        loss = train_teacher.sdpo_loss(logp, logp.detach(), advantage, torch.ones(n), 1e-4)
    loss.sum().backward()
    assert cosine(-mean.grad.mean(0), goal - mu) > 0.95        # descending, the reward climbs


# -------------------- imitation
def test_draw_sigma_is_logit_normal_around_the_schedules_middle():
    fine = T.open_field(str(SHAPES / 'base')).sigmas(1000, 24, 24)
    n, r, normal = 20000, random.Random(0), Normal(math.log(3), 1.0)
    wanted = dict(uniform=lambda q: 3 * q / (1 + 2 * q),
                  logit_normal=lambda q: float(normal.icdf(torch.tensor(q)).sigmoid()))
    for kind, want in wanted.items():
        drawn = [float(train_teacher.draw_sigma(fine, r, kind)) for _ in range(n)]
        for q in (0.05, 0.25, 0.5, 0.75, 0.95):
            found = torch.tensor(drawn).quantile(q).item()
            assert found == pytest.approx(want(q), abs=0.015)


@pytest.mark.parametrize('share', [0.0, 0.25, 1.0])
def test_prompts_are_dropped_as_often_as_asked(share):
    models, row = standing([]), rows_of(SHAPES / 'local_edit.csv')[0]
    c = SimpleNamespace(seed=0, prompt_dropout=share, sigmas='uniform', micro_batch=64)
    samples = [T.Sample(row, (24, 24), T.torch_rng(i), number=i) for i in range(192)]
    with torch.no_grad():
        batches = [t.batch for u in train_teacher.sft(samples, models, c) for t in u]
    dropped = sum(s.cond is s.empty for b in batches for s in b)
    assert dropped / 192 == pytest.approx(share, abs=0.08 * (0 < share < 1))
    words = models.field.encode('', True)['text']
    for s in batches[0]:                                       # its source stays
        assert torch.equal(s.cond['text'], words) == (s.cond is s.empty) and 'source' in s.cond


def test_imitations_loss_is_that_of_flow_matching(world):
    models, row = standing([], moved=0.1), rows_of(world.at / 'edits.csv')[0]
    c = SimpleNamespace(seed=0, prompt_dropout=0.0, sigmas='uniform', micro_batch=8)
    sample = [T.Sample(row, (24, 24), T.torch_rng('noise'), number=0)]
    term, = train_teacher.flow_matching(sample, models, c)
    x0 = models.field.encode_image(files.load_image(row['target_image'], 24, 24)[None])
    eps, sigma = torch.randn(x0[0].shape, generator=T.torch_rng('noise')), term.numbers['sigma']
    with torch.no_grad():
        v = models.velocity('student', term.batch, x0 + sigma * (eps - x0), sigma)
    torch.testing.assert_close(term.loss.detach(), (v - eps + x0).square().flatten(1).mean(1))


def test_imitation_lowers_its_loss(world, tmp_path):
    out = world.teach(tmp_path / 'run', method='sft', data=[str(world.at / 'edits.csv')],
                      max_steps=15, eval_samples=8)
    loss = result(out)['loss/edits']
    assert loss['after'] < 0.97 * loss['before']


# -------------------- runs
def test_a_log_that_lost_its_beginning_has_no_before(world, tmp_path):
    argv = dict(method='sft', data=[str(world.at / 'edits.csv')], eval_samples=1, save_every=1)
    out = world.teach(tmp_path / 'run', max_steps=1, **argv)
    assert set(result(out)['loss/edits']) == {'before', 'after'}
    (out / 'log.jsonl').unlink()
    world.teach(tmp_path / 'run', max_steps=2, init_from='resume', **argv)
    assert set(result(out)['loss/edits']) == {'after'}


@pytest.mark.parametrize('method', TEACHERS)
def test_a_teacher_resumes_bit_for_bit(method, world, tmp_path):
    (tmp_path / 'few.csv').write_text('prompt\na red circle on white\na green square on black\n')
    data = [str(world.at / 'edits.csv') if method == 'sft' else str(tmp_path / 'few.csv')]
    argv = world.teacher(tmp_path / 'run', data=data, max_steps=6, save_every=3, ckpt_keep=3,
                         **TEACHERS[method])
    out = run(train_teacher.main, argv)
    resumes_exactly(train_teacher.main, argv, out, 3, 6)
    if method == 'sdpo':                                       # its memory is part of the state
        meta = json.loads((out / 'step_000006' / 'meta.json').read_text())
        memory = {(p, i): v for p, reward, i, v in meta['state']}
        assert len(memory) == 2 * 2 and max(map(len, memory.values())) == 20
    if method != 'sft':
        assert log(out, 'groups') == [4] * 6
    found = merge_lora.fit(merge_lora.read_adapter(out), merge_lora.model_shapes(SHAPES / 'base'))
    assert sorted(found) == sorted(LAYERS)                     # the run's folder is a teacher


@pytest.mark.parametrize('method', ['grpo', 'sdpo'])
def test_groups_without_a_difference_are_skipped_and_counted(method, world, tmp_path):
    reward = [dict(reward=f'{world.at}/judges.py:constant')]
    out = world.teach(tmp_path / 'run', reward=reward, max_steps=2, **TEACHERS[method])
    groups = 8 // TEACHERS[method]['group_size']
    assert log(out, 'groups') == log(out, 'skipped_groups') == [groups, groups]
    assert log(out, 'skipped_share') == [1, 1]
    assert log(out, 'kl') == ([] if method == 'grpo' else [0, 0])      # grpo looked at nothing
    if method == 'grpo':
        assert log(out, 'idle') == [2, 4] and torch.equal(weights(out, 0), weights(out, 2))




@pytest.mark.parametrize('updates, drop_last', [(1, 1), (2, 1), (3, 1), (2, 0)])
def test_every_update_of_sdpo_has_the_whole_weight(updates, drop_last, world, tmp_path,
                                                   monkeypatch):
    """Three trained steps and two updates, say: their losses' weights sum to 1 in each."""
    monkeypatch.setattr(train_teacher, 'sdpo_loss', lambda logp, *a: logp[0::2] * 0 + 1)
    method = train_teacher.METHODS['sdpo']
    sums, trained = [], []

    def watched(terms):
        sums.append(0.0)
        for term in terms:
            sums[-1] += sum(s.share * x.item() for s, x in zip(term.batch, term.loss))
            trained.append(len(term.batch))
            yield term
    monkeypatch.setitem(train_teacher.METHODS, 'sdpo', method._replace(
        updates=lambda *a: map(watched, method.updates(*a))))
    world.teach(tmp_path / 'run', method='sdpo', group_size=2, steps=3 + drop_last, max_steps=1,
                updates=updates, drop_last=drop_last, micro_batch=4)
    assert sums == pytest.approx([1.0] * updates) and sum(trained) == 8 * 3


def test_best_of_trains_on_the_best_and_the_worst_alone(world, tmp_path, monkeypatch):
    method, seen = train_teacher.METHODS['grpo'], []

    def watched(terms, samples):
        for term in terms:
            seen.append((term, samples))
            yield term
    monkeypatch.setitem(train_teacher.METHODS, 'grpo', method._replace(
        updates=lambda samples, *a: (watched(t, samples) for t in method.updates(samples, *a))))
    rewards_of, note = {}, train_teacher.Judges.note

    def noted(self, batch, values, *a):
        rewards_of.update({(s.step, s.number): x.item() for s, x in zip(batch, values[0])})
        return note(self, batch, values, *a)
    monkeypatch.setattr(train_teacher.Judges, 'note', noted)
    out = world.teach(tmp_path / 'run', method='grpo', group_size=4, best_of=2, max_steps=2)
    assert seen and log(out, 'idle')[-1] == 0
    for term, samples in seen:
        for g in {s.group for s in samples}:
            group = sorted((s for s in samples if s.group == g),
                           key=lambda s: rewards_of[s.step, s.number])
            kept = {s.number for s in term.batch if s.group == g}
            assert kept == {group[0].number, group[-1].number}
        # with half of the samples, each counts twice
        assert sum(s.share for s in term.batch) == pytest.approx(0.5)


class Traced(SimpleNamespace):
    """Settings that remember which of them were read."""
    read = set()

    def __getattribute__(self, key):
        if not key.startswith('__'):
            Traced.read.add(key)
        return object.__getattribute__(self, key)


def test_each_method_reads_the_settings_that_its_entry_names(world, tmp_path, monkeypatch):
    """From the checks on, in a run."""
    own, launch, read = checks.own_settings, train_teacher.launch, {}
    monkeypatch.setattr(checks, 'own_settings', lambda *a: Traced(**vars(own(*a))))

    def begun(*a):
        Traced.read = set()
        return launch(*a)
    monkeypatch.setattr(train_teacher, 'launch', begun)
    for method, more in TEACHERS.items():
        data = [str(world.at / 'edits.csv')]
        world.teach(tmp_path / method, **more | dict(data=data, max_steps=1, eval_samples=1))
        read[method] = set(Traced.read)
    everywhere = set.intersection(*read.values())
    for method, entry in train_teacher.METHODS.items():
        assert set(entry.settings) <= read[method], method
        some = read[method] & set(train_teacher.SETTINGS[0]) - everywhere
        assert some <= set(entry.settings), method


def test_the_kl_to_the_base_is_seen_without_being_asked_for(world, tmp_path):
    more = dict(method='grpo', group_size=4, max_steps=3)
    free, held = (world.teach(tmp_path / str(b), kl_beta=b, **more) for b in (0.0, 1e-9))
    assert log(free, 'kl')[0] == 0 and min(log(free, 'kl')[1:]) > 1e-9
    assert torch.allclose(weights(free, 3), weights(held, 3), atol=1e-5)


def test_no_reward_of_sdpo_wins_by_its_scale(world, tmp_path):
    def bright(name):
        return [dict(reward=f'{SHAPES}/world.py:reward', weight=2.0),
                dict(reward=f'{world.at}/judges.py:{name}', weight=1.0)]
    small, large = (world.teach(tmp_path / k, reward=bright(k), **TEACHERS['sdpo'])
                    for k in ('bright', 'very_bright'))
    moved = (weights(small, 4) - weights(small, 0)).abs().max()
    assert torch.allclose(weights(small, 4), weights(large, 4), atol=0.02 * moved)


@pytest.mark.parametrize('main, more', [
    (train_teacher.main, dict(method='grpo', kl_beta=0.1)),
    (train_teacher.main, dict(method='grpo', kl_beta=0.1, dtype='bfloat16')),
    (T.main, dict(method='flowopd', eta=0.7, init_from='merge', reward='k1_group'))])
def test_a_group_larger_than_a_forward(main, more, world, tmp_path, monkeypatch):
    """A group is compared as a whole, and learned from in forwards of micro_batch."""
    seen, velocity, found = [], T.Field.velocity, []

    def watched(self, z, *a):
        if torch.is_grad_enabled():
            seen.append(len(z))
        return velocity(self, z, *a)
    monkeypatch.setattr(T.Field, 'velocity', watched)
    words = world.teacher if main is train_teacher.main else world.opd
    for size in (8, 1):
        seen.clear()
        out = run(main, words(tmp_path / str(size), group_size=4, micro_batch=size, max_steps=1,
                              **more))
        assert max(seen) == (1 if size == 1 else 4 if main is T.main else 8)
        assert log(out, 'ratio_off') == [0]                    # the policy that drew the samples
        found.append(first_gradient(out))
    off = 0.2 if 'dtype' in more else 1e-4
    assert found[0].norm() > 0 and (found[0] - found[1]).norm() < off * found[0].norm()


def test_sdpo_on_a_unet(tmp_path):
    from pipelines import LENGTH, SIZES, WORDS, build
    build('sd-turbo').pipe.save_pretrained(tmp_path / 'model')
    (tmp_path / 'things.txt').write_text('\n'.join(WORDS))
    settings = dict(
        model=f'{tmp_path}/model', data=[f'{tmp_path}/things.txt'], reward=[dict(reward='jpeg')],
        method='sdpo', device='cpu', resolution=list(SIZES[0]), steps=4, sample_steps=4, show=1,
        group_size=2, batch_size=4, micro_batch=4, max_steps=3, log_every=1, rank=2, lr=1e-2,
        eval_samples=2, max_sequence_length=LENGTH)
    out = run(train_teacher.main, as_words(settings, tmp_path / 'run'))
    assert log(out, 'skipped') == [0, 0, 0] and all(x > 0 for x in log(out, 'grad_norm'))
    assert log(out, 'kl')[-1] > 0


# -------------------- mistakes
GRPO = dict(method='grpo', group_size=4)
SDPO = dict(method='sdpo', group_size=2)
MISTAKES = {
    'group_size = 1: GRPO compares the samples of one prompt': dict(method='grpo'),
    'group_size = 4: SDPO compares two trajectories': dict(SDPO, group_size=4),
    "same_noise = False: SDPO's pairs": dict(SDPO, same_noise=False),
    'words: "a red circle on white" has no target_image': dict(method='sft'),
    r"no reward is called 'shape', did you mean shapes\?": dict(
        GRPO, reward=[dict(reward='shape')]),
    'nowhere.py:score: no such file': dict(GRPO, reward=[dict(reward='nowhere.py:score')]),
    r'judges.py:nun: .* has no such function, did you mean nan\?': dict(
        GRPO, reward=[dict(reward='HERE/judges.py:nun')]),
    'best_of: method = .sdpo. does not read it; leave it at 0': dict(SDPO, best_of=2),
    'best_of = 9: 0, or from 2 to group_size = 4': dict(GRPO, best_of=9),
    'updates: method = .sft. does not read it; leave it at 1': dict(method='sft', updates=2),
    'reward: method = .sft. does not read it': dict(method='sft', reward=[dict(reward='jpeg')]),
    'prompt_dropout: method = .grpo. does not read it': dict(GRPO, prompt_dropout=0.1),
    'updates = 3: at most one for each of the 2': dict(SDPO, updates=3),
    'leaves nothing of a rollout of 3': dict(SDPO, drop_last=7),
    'buffer = 8: SDPO uses it from 16': dict(SDPO, buffer=8),
    'gamma = 5.0: at most 1': dict(SDPO, gamma=5.0),
    'micro_batch = 1: the pairs of SDPO': dict(SDPO, micro_batch=1),
    "eta = 2.0: at most 1 with sde = 'cps'": dict(GRPO, sde='cps', eta=2.0),
    "kl_var = 'code' is about": dict(GRPO, sde='cps', kl_var='code'),
    'aesthetic reward needs safetensors': dict(GRPO, reward=[dict(reward='aesthetic')]),
    "reward {'reward': 5}: a dict": dict(GRPO, reward=[dict(reward=5)]),
    "weight must be more than 0, not '1'": dict(GRPO, reward=[dict(reward='jpeg', weight='1')]),
    'reward is empty': dict(GRPO, reward=[]),
    'reward: one stands there twice': dict(GRPO, reward=2 * [dict(reward='jpeg')]),
    "reward 'jpeg': weight must be more than 0": dict(
        GRPO, reward=[dict(reward='jpeg', weight=0)]),
    "init_from = 'merge' belongs to train_opd.py": dict(GRPO, init_from='merge')}


@pytest.mark.parametrize('says', MISTAKES)
def test_a_mistake_in_a_teachers_run_is_named(says, world, tmp_path):
    more = eval(repr(MISTAKES[says]).replace('HERE', str(world.at)))
    with pytest.raises(BadInput, match=says):
        world.teach(tmp_path / 'out', **more)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('judge, says', [('short', 'gave 2 values for 3 pictures'),
                                         ('nan', 'it gave nan')])
def test_a_reward_that_fails_stops_the_run_and_saves_the_sample(judge, says, world, tmp_path):
    reward = [dict(reward=f'{world.at}/judges.py:{judge}')]
    with pytest.raises(RewardError, match=f'{says}.*reward_failed.png'):
        world.teach(tmp_path / 'out', method='grpo', group_size=4, reward=reward)
    assert 'prompt' in json.loads((tmp_path / 'out' / 'reward_failed.json').read_text())
    assert files.load_image(tmp_path / 'out' / 'reward_failed.png', 24, 24).shape == (3, 24, 24)


def test_after_a_failed_reward_nobody_is_asked_again(world, tmp_path):
    """In training: evaluation is the first question, then a micro-batch is one."""
    reward = [dict(reward=f'{world.at}/judges.py:tired')]
    with pytest.raises(RewardError, match='gave 1 values for 2 pictures') as e:
        world.teach(tmp_path / 'out', method='grpo', group_size=2, reward=reward, micro_batch=2,
                    eval_samples=2)
    note = json.loads((tmp_path / 'out' / 'reward_failed.json').read_text())
    assert f'"{note["prompt"]}"' in str(e.value)               # what is saved is what is named
    asked = files.load_function(f'{world.at}/judges.py:tired').__globals__['asked']
    assert len(asked) == 3


@pytest.mark.parametrize('n', [10, 40])                        # of the batch; of what is remembered
def test_a_return_is_compared_with_those_of_its_prompt_reward_and_step(n):
    from support.judges import Judges, buffered
    judges, r = Judges.__new__(Judges), random.Random(0)
    judges.weights, judges.memory, judges.buffer = dict(a=1.0, b=2.0), {}, 32
    found = [(k, 'xy'[k % 2], [[r.gauss(9 * w + 3 * i + k % 2, 1) for i in range(2)]
                               for w in range(2)]) for k in range(n)]
    said = judges.remember(found)
    for k, prompt, R in found:
        own = [x for _, p, x in found if p == prompt]
        for i in range(2):
            want = sum((w + 1) * buffered(R[w][i], [x[w][i] for x in own],
                                          [x[w][i] for _, _, x in found]) for w in range(2))
            assert said[k][i] == pytest.approx(want, abs=1e-5)
