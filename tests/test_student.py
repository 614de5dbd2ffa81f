"""The student: where it starts, and its updates: averaged, idle, skipped, compiled."""
from conftest import *

FINE = SimpleNamespace(grad_clip=0.0, ema_decay=0.9, ema_every=1)


def student_of(**more):
    """A student of two small layers that begins at nothing; and a way to give it a gradient."""
    torch.manual_seed(0)
    net = torch.nn.ModuleDict(dict(a=torch.nn.Linear(6, 5), b=torch.nn.Linear(5, 4)))
    from diffusers.loaders import PeftAdapterMixin
    kind = type('Net', (torch.nn.Module, PeftAdapterMixin), {})
    holder = kind()
    holder.net = net
    c = SimpleNamespace(**dict(rank=2, alpha=2.0, seed=0, betas=(0.9, 0.99), weight_decay=0.0,
                               ema_decay=0.5, ema_every=1) | more)
    return M.Student(holder, c, ['net.a', 'net.b'])


def push(student, c=FINE, scale=1.0, lr=0.1):
    for p in student.params.values():
        p.grad = torch.full_like(p, scale)
    return student.update(lr, c, ALONE)


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors.values()])


# -------------------- updates
def test_the_average_counts_updates():
    c = SimpleNamespace(**dict(vars(FINE), ema_every=4))
    student, moved = student_of(ema_every=4), []
    for k in range(1, 13):
        before = flat(student.ema)
        push(student, c)
        if not torch.equal(flat(student.ema), before):
            moved.append(k)
            want = 0.9 * before + 0.1 * flat(student.params)
            torch.testing.assert_close(flat(student.ema), want)
    assert moved == [4, 8, 12]


def test_the_average_of_a_run_with_two_updates_a_step(world, tmp_path):
    out = world.distil(tmp_path / 'run', method='flowopd', eta=0.7, updates=2, ema_every=4,
                       max_steps=4, save_every=1, ckpt_keep=9, steps=2, eval_samples=1)
    means = [average(out, k)['proj_out'][1] for k in range(5)]
    assert [state(out, k)['counts']['updates'] for k in range(5)] == [0, 2, 4, 6, 8]
    assert [torch.equal(a, b) for a, b in zip(means, means[1:])] == [True, False, True, False]


def test_without_a_gradient_nothing_moves():
    student = student_of()
    push(student)
    before, mean = flat(student.params), flat(student.ema)
    moments = [x['exp_avg'].clone() for x in student.optimizer.state.values()]
    assert push(student, scale=0.0) == 0
    assert student.update(0.1, FINE, ALONE) == 0               # no term at all
    assert torch.equal(flat(student.params), before) and torch.equal(flat(student.ema), mean)
    after = [x['exp_avg'] for x in student.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after))
    assert (student.updates, student.idle, student.skipped) == (1, 2, 0)
    push(student)
    assert not torch.equal(flat(student.params), before) and student.updates == 2


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_skipped(bad):
    student = student_of()
    push(student)
    before = flat(student.params)
    assert not math.isfinite(push(student, scale=bad))
    assert torch.equal(flat(student.params), before)
    assert (student.updates, student.idle, student.skipped) == (1, 0, 1)
    assert push(student) > 0 and flat(student.params).isfinite().all()
    assert [*student.recent] == [False, True, False]


@pytest.mark.parametrize('clip', [0.5, 100.0])
def test_gradients_are_clipped_as_a_whole(clip):
    """By SGD, so that their size is seen; what is smaller stays as it is."""
    student = student_of()
    student.optimizer = torch.optim.SGD(student.params.values(), lr=0.0)
    before, c = flat(student.params), SimpleNamespace(**dict(vars(FINE), grad_clip=clip))
    norm = push(student, c, scale=3.0, lr=1.0)
    assert norm == pytest.approx(3 * len(before) ** 0.5)
    assert (flat(student.params) - before).norm().item() == pytest.approx(min(clip, norm),
                                                                           rel=1e-4)


# -------------------- not finite, in runs
def broken(monkeypatch, when):
    """What the student says has no finite gradient in updates that `when` names."""
    count, update, velocity = [0], M.Student.update, T.Models.velocity

    def counted(self, *a):
        count[0] += 1
        return update(self, *a)

    def spoiled(self, *a, **k):
        v = velocity(self, *a, **k)
        spoil = v.requires_grad and when(count[0])
        return v + (v - v.detach()).abs().sqrt() if spoil else v
    monkeypatch.setattr(M.Student, 'update', counted)
    monkeypatch.setattr(T.Models, 'velocity', spoiled)


def test_a_skipped_update_is_counted_and_named(world, tmp_path, monkeypatch, capsys):
    broken(monkeypatch, lambda k: k == 1)
    out = world.distil(tmp_path / 'run', max_steps=3, eval_samples=1, save_every=1, ckpt_keep=9)
    assert log(out, 'skipped') == [0, 1, 1] and 'NaN' not in (out / 'log.jsonl').read_text()
    assert len(log(out, 'grad_norm')) == 2                     # of those that were made
    assert torch.equal(weights(out, 1), weights(out, 2))
    assert not torch.equal(weights(out, 2), weights(out, 3))
    said = capsys.readouterr().out
    assert re.search(r'step 2: update skipped, its gradient was not finite \(route edits, sigma '
                     r'[01]\.\d{3}, whose loss was finite', said)
    assert '1 updates were skipped' in said


@pytest.mark.parametrize('when', [lambda k: True, lambda k: k % 2 == 1], ids=['all', 'alternating'])
def test_too_many_skipped_updates_end_the_run(when, world, tmp_path, monkeypatch):
    broken(monkeypatch, when)
    with pytest.raises(BadInput, match='5 of the last .* updates had no finite gradient, lastly at '
                       'route edits, sigma .* Lower lr'):
        world.distil(tmp_path / 'run', max_steps=30, eval_samples=1, steps=1, save_every=1)
    last = int(R.newest(tmp_path / 'run').name[5:])
    assert last >= 4 and weights(tmp_path / 'run', last).isfinite().all()


def test_what_a_resume_knows_of_skipped_updates(world, tmp_path, monkeypatch):
    """A run does not outlive its NaNs by being resumed."""
    broken(monkeypatch, lambda k: True)
    argv = world.opd(tmp_path / 'run', max_steps=3, eval_samples=1, steps=1)
    run(T.main, argv)
    with pytest.raises(BadInput, match='5 of the last 5 updates'):
        run(T.main, [*argv, '--max_steps=6', '--init_from=resume'])


def test_the_route_and_sigma_of_the_first_bad_loss_are_named(world, tmp_path):
    """Where the loss itself is not finite: a teacher beyond all numbers; others come after it."""
    huge = random_lora(tmp_path / 'beyond', 3, size=1e30)
    teachers = [dict(name='one', lora=world.one), dict(name='huge', lora=huge)]
    for first, second in (('one', 'huge'), ('huge', 'one')):
        routes = [dict(teacher=first, data='words'), dict(teacher=second, data='edits')]
        bad = 'words' if first == 'huge' else 'edits'
        with pytest.raises(BadInput, match=rf'lastly at route {bad}, sigma [01]\.\d{{3}}\. Lower'):
            world.distil(tmp_path / f'run_{first}', teachers=teachers, routes=routes, steps=2,
                         max_steps=9, eval_samples=1, save_every=1)
    assert torch.equal(weights(tmp_path / 'run_one', 3), weights(tmp_path / 'run_one', 4))


# -------------------- where it starts
def test_a_base_in_bfloat16_learns_from_a_merged_start_and_resumes(world, tmp_path):
    """As on a GPU: base and teachers in bfloat16, the student in float32, its start exact."""
    argv = world.opd(tmp_path / 'run', max_steps=2, save_every=1, init_from='merge',
                     dtype='bfloat16')
    out = run(T.main, argv)
    start, want = merge_lora.read_adapter(out / 'start'), merge_lora.merge(
        [merge_lora.read_adapter(p) for p in (world.one, world.two)], [0.5, 0.5])
    for k, (A, B, scale) in want.items():
        a, b, s = start[k]
        torch.testing.assert_close(s * b @ a, scale * B @ A, rtol=1e-4, atol=1e-6)
    assert all(x.dtype == torch.float32 for x in state(out, 2)['student'].values())
    resumes_exactly(T.main, argv, out, 1, 2)


def test_a_merged_start_is_the_mean_by_the_routes_weights(world):
    """Of routes to LoRA teachers, renormalised: the base's route has no part in it."""
    models = standing([dict(name='base'), dict(name='one', lora=world.one),
                       dict(name='two', lora=world.two)])
    routes = [dict(teacher='one', weight=3.0), dict(teacher='two', weight=1.0),
              dict(teacher='base', weight=9.0)]
    found = M.merged_start(models, SimpleNamespace(routes=routes))
    one, two = (merge_lora.read_adapter(p) for p in (world.one, world.two))
    for k, (A, B, scale) in found.items():
        want = sum(w * m[k][2] * m[k][1] @ m[k][0] for w, m in ((0.75, one), (0.25, two)))
        torch.testing.assert_close(scale * B @ A, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('rank, warned', [(4, False), (2, True)])
def test_what_a_start_loses_by_its_rank_is_said(rank, warned, world, tmp_path, capsys):
    out = world.distil(tmp_path / 'run', init_from='merge', max_steps=1, eval_samples=1, steps=1,
                       rank=rank)
    said = capsys.readouterr().out
    assert ('WARNING' in said) == warned
    if warned:
        start = merge_lora.read_adapter(out / 'start')
        exact = merge_lora.merge([merge_lora.read_adapter(p) for p in (world.one, world.two)],
                                 [0.5, 0.5])
        lost = merge_lora.size(merge_lora.merge([exact, start], [1.0, -1.0]))
        share = 100 * lost / merge_lora.size(exact)
        found = float(re.search(r'differs from the exact one by ([0-9.]+)%', said)[1])
        assert found == pytest.approx(share, abs=0.06) and found > 5
        assert 'rank 4 would hold the start whole' in said


# -------------------- the rate, compiled blocks
def test_the_rate_follows_the_settings():
    c = SimpleNamespace(lr=2.0, warmup=10, max_steps=100, lr_schedule='constant')
    rates = [train_opd.learning_rate(k, c) for k in (0, 4, 9, 50, 99)]
    assert rates == pytest.approx([0.2, 1, 2, 2, 2])
    c.lr_schedule = 'cosine'
    assert train_opd.learning_rate(50, c) == pytest.approx(1.0)
    assert train_opd.learning_rate(99, c) == pytest.approx(0.04)       # it falls to 2 %


def test_compiled_blocks_say_and_learn_the_same(world, monkeypatch):
    """Block by block, as the family names them; by a backend that is quick to build."""
    compiled, compile = [], torch.nn.Module.compile

    def quick(self, *a, **k):
        compiled.append(type(self).__name__)
        return compile(self, backend='aot_eager')
    monkeypatch.setattr(torch.nn.Module, 'compile', quick)
    said = []
    for on in (False, True):
        models = T.Models(T.open_field(str(SHAPES / 'base')), [dict(name='one', lora=world.one)])
        c = configure(T.SETTINGS, ['--init_from=base', '--rank=2', f'--compile={on}'])
        c.lora_targets = ['proj_out', 'transformer_blocks.3.attn.to_q']
        student = M.open_student(models, c)
        batch = [SimpleNamespace(cond=models.field.encode('a red circle on white'))] * 2
        z = torch.randn(2, *models.field.shape(24, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            target = models.velocity('one', batch, z, torch.tensor([0.8, 0.3]))
        v = models.velocity('student', batch, z, torch.tensor([0.8, 0.3]))
        T.velocity_error(v, target).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in student.params.values()])
        said.append((target, v.detach(), gradient))
    torch._dynamo.reset()
    assert compiled == ['JointTransformerBlock'] * 4
    for plain, fast in zip(*said):
        assert plain.norm() > 0 and (plain - fast).norm() < 1e-4 * plain.norm()


def test_checkpointing_learns_the_same(world, tmp_path):
    more = dict(max_steps=1, eval_samples=1, steps=2, anchor='two', anchor_beta=0.1)
    plain, again = (world.distil(tmp_path / str(k), grad_checkpointing=k, **more)
                    for k in (False, True))
    a, b = first_gradient(plain), first_gradient(again)
    assert (a - b).norm() < 1e-5 * a.norm()


def test_all_processes_begin_as_the_first(monkeypatch):
    """Its average and its start too."""
    sent = []
    monkeypatch.setattr(M, 'dist', SimpleNamespace(
        is_initialized=lambda: True, broadcast=lambda x, src: sent.append(src) or x.fill_(7.0)))
    student = student_of()
    assert sent == [0] * len(student.params)
    for tensors in (student.params, student.start, student.ema):
        assert (flat(tensors) == 7).all()


# -------------------- in a run
def test_a_run_steps_at_its_rate(world, tmp_path):
    """As the optimizer had it; and that is what the log says."""
    more = dict(lr_schedule='cosine', warmup=2, max_steps=3)
    out = world.distil(tmp_path / 'run', save_every=1, ckpt_keep=9, steps=1, eval_samples=1, **more)
    rates = [state(out, k)['optimizer']['param_groups'][0]['lr'] for k in (1, 2, 3)]
    c = SimpleNamespace(lr=2e-2, **more)
    assert rates == pytest.approx([T.learning_rate(k, c) for k in range(3)])
    assert log(out, 'lr') == pytest.approx(rates)


def test_rank_that_the_start_leaves_is_learned_with_as_well(world, tmp_path):
    """A start of rank 2 in a student of rank 4."""
    out = world.distil(tmp_path / 'run', init_from=world.one, max_steps=1, steps=1, eval_samples=1,
                       routes=[dict(teacher='two', data='words')])
    A, B, _ = merge_lora.read_adapter(out / 'start')['proj_out']
    assert not B[:, 2:].any() and A.any(1).all()
    assert state(out, 1)['student']['proj_out.lora_B.student.weight'][:, 2:].any(0).all()
