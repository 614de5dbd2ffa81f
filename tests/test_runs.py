"""Runs: resumed, killed, asked to stop; their folder, checkpoints and log."""
from conftest import *
from support import processes


# -------------------- a resumed run is the run
def shortened(out, name, last):
    """A copy of a run as a kill after checkpoint `last` leaves it: its log has gone further."""
    other = out.with_name(name)
    shutil.copytree(out, other, symlinks=True)
    for p in other.glob('step_*'):
        if int(p.name[5:]) > last:
            shutil.rmtree(p)
    (other / 'result.json').unlink()
    return other


@pytest.mark.parametrize('method', ['danceopd', 'grpo'])
def test_the_log_of_a_resumed_run_is_that_of_a_whole_one(method, world, tmp_path):
    """Means over steps before and after the resume, counts, and each evaluation once."""
    main, words = (T.main, world.opd) if method == 'danceopd' else (train_teacher.main,
                                                                   world.teacher)
    more = {} if method == 'danceopd' else dict(group_size=4)
    argv = words(tmp_path / 'run', method=method, max_steps=8, save_every=3, eval_every=3,
                 log_every=4, ckpt_keep=9, steps=2, micro_batch=3 if not more else 8, **more)
    out = run(main, argv)
    lines = [(e['step'], 'lr' in e) for e in entries(out)]
    assert lines == [(0, False), (3, False), (4, True), (6, False), (8, True), (8, False)]
    later = shortened(out, 'later', 6)
    text = (later / 'log.jsonl').read_text().splitlines()
    (later / 'log.jsonl').write_text('\n'.join(text[:4]) + '\n' + text[4][:30])
    before = shortened(out, 'before', 6)                       # killed before it was evaluated
    (before / 'log.jsonl').write_text('\n'.join(text[:3]) + '\n')
    further = shortened(out, 'further', 6)
    for copy in (later, before, further):
        run(main, [*argv, '--init_from=resume', f'--out_dir={copy}'])
        same_state(out, copy, 8)
        assert timeless(copy) == timeless(out)
        assert result(copy) == result(out)
    assert entries(out)[4]['loss'] != entries(out)[2]['loss']


# A run is started over and over and killed, at random and while it saves; then it is finished.
KILLED = '''if True:
    import os, random, signal, sys, time, torch, diffusers, transformers, train_opd
    from pathlib import Path
    from support import run as R
    random.seed(0)
    argv = sys.argv[1:]
    out = Path(next(a for a in argv if a.startswith('--out_dir='))[11:-1])

    def start(*more):
        if pid := os.fork():
            return pid
        sys.stdout = open(os.devnull, 'w')
        train_opd.main([*argv, *more, *['--init_from=resume'] * bool(R.newest(out))])
        os._exit(0)

    for k in range(4):
        before, pid, t0 = R.newest(out), start(), time.time()
        while R.newest(out) == before and time.time() - t0 < 200:      # one step further at least
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.1))
        while k % 2:                                           # stop, and look: is it saving?
            os.kill(pid, signal.SIGSTOP)
            os.waitpid(pid, os.WUNTRACED)
            if list(out.glob('.writing_step_*')):
                break
            os.kill(pid, signal.SIGCONT)
            time.sleep(random.uniform(0, 0.005))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, 'it ended before it was killed'
        for whole in (R.newest(out), (out / 'latest').resolve()):
            torch.load(whole / 'train_state.pt', weights_only=True)
            (whole / 'meta.json').read_text()
    last = int(R.newest(out).name[5:]) + 3
    assert os.waitpid(start(f'--max_steps={last}'), 0)[1] == 0
    print(last)
'''


def test_a_killed_run_is_resumable_and_loses_nothing(world, tmp_path):
    more = dict(max_steps=10 ** 6, save_every=1, steps=1, batch_size=4, eval_samples=1, ckpt_keep=2,
                log_every=2)
    argv = world.opd(tmp_path / 'killed', **more)
    p = python('-c', KILLED, *argv)
    assert p.returncode == 0, p.stderr[-2000:]
    last, killed = int(p.stdout), tmp_path / 'killed'
    whole = world.distil(tmp_path / 'whole', **more | dict(save_every=last, max_steps=last))
    same_state(killed, whole, last)
    assert timeless(killed) == timeless(whole)
    left = sorted(p.name for p in killed.glob('*step_*'))
    assert left == [f'step_{last - 1:06d}', f'step_{last:06d}']
    assert not list(killed.glob('.writing*'))


def test_sigterm_saves_and_ends_well(world, tmp_path):
    argv = world.opd(tmp_path / 'run', max_steps=100000, steps=1, eval_samples=1)
    p = subprocess.Popen([sys.executable, 'train_opd.py', *argv], cwd=ROOT, env=ONE_THREAD,
                         text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        for line in p.stdout:
            if line.startswith('step      2 '):
                p.send_signal(signal.SIGTERM)
                break
        said, errors = p.communicate(timeout=300)
    finally:
        p.kill()
    last = R.newest(tmp_path / 'run')
    assert p.returncode == 0, errors
    step = json.loads((last / 'meta.json').read_text())['step']
    assert f'asked to stop: saved step {step}; continue with --init_from=resume' in said
    assert last.name == f'step_{step:06d}' and 2 <= step < 100000


def test_who_is_stopped_is_told_of_a_resume_only_when_there_is_one(monkeypatch):
    monkeypatch.setattr(processes.signal, 'signal', lambda *a: None)
    stop = processes.Stop()
    with pytest.raises(KeyboardInterrupt, match='stays$'):
        stop.hear(2, None)
    out = SimpleNamespace(log=SimpleNamespace(notes=[]), c=SimpleNamespace(ckpt_keep=1), out='x',
                          world=SimpleNamespace(rank=1, size=1, stop=stop))
    stop.busy = True
    R.Folder.save(out, 7, None)
    with pytest.raises(KeyboardInterrupt, match='init_from=resume goes on from step 7'):
        stop.hear(2, None)


def test_a_torn_line_in_the_log_does_not_stop_a_resume(world, tmp_path):
    argv = world.opd(tmp_path / 'run', max_steps=2, steps=1, eval_samples=1, save_every=1)
    out = run(T.main, argv)
    first = result(out)
    with open(out / 'log.jsonl', 'a') as f:
        f.write('{"step": 3, "lo')
    run(T.main, [*argv, '--max_steps=3', '--init_from=resume'])
    assert len(log(out, 'loss')) == 3                          # where it began is still known:
    assert [r['gap_before'] for r in result(out).values()] == [
        r['gap_before'] for r in first.values()]


def test_a_resume_follows_new_settings_of_the_optimizer(world, tmp_path, capsys):
    argv = world.opd(tmp_path / 'run', max_steps=1, save_every=1, eval_samples=1)
    run(T.main, argv)
    out = run(T.main, [*argv, '--max_steps=2', '--weight_decay=0.5', '--betas=[0.1, 0.2]',
                       '--init_from=resume'])
    now = state(out, 2)['optimizer']['param_groups'][0]
    assert now['weight_decay'] == 0.5 and now['betas'] == (0.1, 0.2)
    assert 'resume: weight_decay was 0.0, is 0.5' in capsys.readouterr().out


def listing(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_another_run_is_not_written_over(world, tmp_path):
    argv = world.opd(tmp_path / 'run', max_steps=1, steps=1, eval_samples=1)
    out = run(T.main, argv)
    before = listing(out)
    with pytest.raises(BadInput, match=r'run holds another run \(at step_000001\); continue it'):
        run(T.main, argv)
    other = [dict(name='one', lora=world.two), dict(name='two', lora=world.two)]
    for word, says in (
            (f'--teachers={other!r}', f'had another teacher "one" .*{world.one}, now {world.two}'),
            ('--rank=7', 'holds another adapter than these settings make: rank'),
            ('--alpha=16.0', 'has alpha 8.0, not 16.0.*: resume with the same')):
        with pytest.raises(BadInput, match=says):
            run(T.main, [*argv, word, '--init_from=resume'])
    meta = out / 'step_000001' / 'meta.json'
    text = meta.read_text()
    other = json.loads(text)
    for name in 'one', 'base':                                 # the base, though no teacher is it
        changed = copy.deepcopy(other)
        changed['teachers'][name]['sha256'] = 'another'
        meta.write_text(json.dumps(changed))
        with pytest.raises(BadInput, match=f'"{name}" .*, now whose weights have changed since'):
            run(T.main, [*argv, '--init_from=resume'])
    meta.write_text(text)
    after = listing(out)
    assert {k: x for k, x in after.items() if k != '.lock'} == {
        k: x for k, x in before.items() if k != '.lock'}
    with pytest.raises(BadInput, match='nothing has no whole checkpoint to resume from'):
        world.distil(tmp_path / 'nothing', init_from='resume')


def test_an_adapters_scale_is_part_of_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    random_lora(tmp_path / 'a', 1)
    file, config = tmp_path / 'a' / merge_lora.FILES[1], tmp_path / 'a' / 'adapter_config.json'
    before = R.sha256(file), R.sha256(tmp_path / 'a' / merge_lora.FILES[0])
    config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    after = R.sha256(file), R.sha256('~/a/' + merge_lora.FILES[0])
    assert before[0] != after[0] and before[1] == after[1] != ''


def test_a_folder_has_one_run_at_a_time(world, tmp_path):
    held = R.locked(tmp_path / 'run')
    with pytest.raises(BadInput, match=f'is being written by process {os.getpid()} on'):
        R.locked(tmp_path / 'run')
    held.close()
    R.locked(tmp_path / 'run').close()


def test_a_file_system_without_locks_does(tmp_path, monkeypatch, capsys):
    def none(*a):
        raise OSError(errno.ENOSYS, 'Function not implemented')
    monkeypatch.setattr(R.fcntl, 'flock', none)
    R.locked(tmp_path / 'run').close()
    assert 'has no locks' in capsys.readouterr().out


def test_a_damaged_checkpoint_is_named_with_what_to_do(world, tmp_path):
    argv = world.opd(tmp_path / 'run', max_steps=2, steps=1, eval_samples=1, save_every=1)
    out = run(T.main, argv)
    file = out / 'step_000002' / 'train_state.pt'
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(BadInput, match='train_state.pt cannot be read .*; delete .*step_000002 to'):
        run(T.main, [*argv, '--max_steps=3', '--init_from=resume'])
    shutil.rmtree(out / 'step_000002')
    run(T.main, [*argv, '--max_steps=3', '--init_from=resume'])
    (out / 'step_000003' / 'meta.json').write_text('{"settings"')
    with pytest.raises(BadInput, match='meta.json is damaged .*; delete .*step_000003 to go on'):
        run(T.main, [*argv, '--max_steps=4', '--init_from=resume'])


def test_a_checkpoint_holds_the_average_for_people_and_the_student_once(world, tmp_path):
    out = world.distil(tmp_path / 'run', max_steps=2, save_every=1, ckpt_keep=1, eval_samples=1)
    assert [p.name for p in R.checkpoints(out)] == ['step_000002']
    assert (out / 'latest').resolve().name == 'step_000002'
    student, mean = state(out, 2)['student'], average(out, 2)
    assert sum(x.numel() for x in student.values()) == sum(A.numel() + B.numel()
                                                          for A, B in mean.values())
    assert not torch.equal(student['proj_out.lora_B.student.weight'], mean['proj_out'][1])
    numbers = sum(x.numel() for x in student.values())
    size = sum(f.stat().st_size for f in (out / 'step_000002').iterdir())
    assert size < 5 * 4 * numbers + 40000                      # and what files begin with
    live = M.last_weights(out / 'step_000002')
    assert torch.equal(live['proj_out'][1], student['proj_out.lora_B.student.weight'])
    assert {scale for _, _, scale in live.values()} == {2.0}


def test_a_resume_continues_its_own_line_in_wandb_and_a_new_run_has_another(tmp_path, monkeypatch):
    ids = []

    def init(id, **k):
        ids.append(id)
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=init))
    c = SimpleNamespace(wandb_log=True, wandb_project='', tensorboard_log=False)
    for resumed in (None, 3, None):
        R.trackers(SimpleNamespace(out=tmp_path, resumed=resumed, meta=dict(settings={}), c=c))
    assert ids[0] == ids[1] != ids[2]


def test_layers_of_a_teacher_that_the_student_lacks_are_told(world, tmp_path, capsys):
    world.distil(tmp_path / 'all', max_steps=1, init_from='base', lora_targets=LAYERS)
    assert "the student's" not in capsys.readouterr().out
    world.distil(tmp_path / 'one', max_steps=1, init_from='base', lora_targets=LAYERS[-1:])
    assert "3 of its 4 layers are not the student's" in capsys.readouterr().out


def test_a_score_may_be_a_rewards_name(world, tmp_path):
    """In the table of a run, in a teacher's evaluations and of what is drawn later."""
    out = world.distil(tmp_path / 'run', max_steps=1, score='jpeg', score_samples=2)
    found = json.loads((out / 'result.json').read_text())['words']
    assert all(-9 < found[k] < 0 for k in ('base', 'teacher', 'start', 'student'))
    out = world.teach(tmp_path / 'teacher', method='grpo', group_size=4, max_steps=1,
                      score='incompressible')
    assert all(0 < x < 9 for x in log(out, 'eval/score/words'))
    with pytest.raises(BadInput, match="score: no reward is called 'jpg', did you mean jpeg"):
        world.distil(tmp_path / 'not', score='jpg')


def test_a_score_that_is_gone_at_the_end_loses_nothing_else(world, tmp_path, monkeypatch):
    """A server that was there at the beginning."""
    asked, load = [], R.rewards.load

    def gone(*a):
        asked.append(a)
        if len(asked) > 1:
            raise BadInput('no server answers there')
        return load(*a)
    monkeypatch.setattr(R.rewards, 'load', gone)
    with pytest.raises(RewardError, match='score jpeg: no server answers.*json; score later'):
        world.distil(tmp_path / 'run', max_steps=1, score='jpeg', score_samples=2)
    found = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert found['words']['gap_after'] > 0 and len(asked) == 2


def test_no_score_without_samples(world, tmp_path):
    out = world.distil(tmp_path / 'run', max_steps=1, score=f'{SHAPES}/world.py:score',
                       score_samples=0)
    assert set(result(out)['words']) == {'gap_before', 'gap_after'}


def test_what_does_not_change_is_drawn_once_a_run(world, tmp_path, monkeypatch):
    seen, drawn, render, curve = [], [], T.render, R.curve

    def watched(who, *a, **k):
        seen.append(who)
        return render(who, *a, **k)
    monkeypatch.setattr(T, 'render', watched)

    def counted(history, *a):
        drawn.append(sum('gap/edits' in e for e in history))
        return curve(history, *a)
    monkeypatch.setattr(R, 'curve', counted)
    out = world.distil(tmp_path / 'run', max_steps=3, eval_every=1, steps=1, eval_samples=1)
    assert drawn == [1, 2, 3, 4, 4]                            # each picture has the newest gap
    assert seen.count('one') == seen.count('two') == 1         # teachers
    assert seen.count('student') == 2 + 2 * 4                  # its start, and four times as it is
    assert len(list((out / 'samples').glob('step_*.png'))) == 4
    assert (out / 'samples' / 'data_edits.png').exists() and (out / 'loss.png').exists()


# -------------------- what is measured
def test_what_is_measured_is_what_is_saved(world, tmp_path):
    """A run that begins with another's files begins with its numbers."""
    score = dict(score=f'{world.at}/judges.py:bright', score_samples=3)
    out = world.distil(tmp_path / 'run', max_steps=3, **score)
    again = result(world.distil(tmp_path / 'again', init_from=str(out), max_steps=1, **score))
    for k, was in result(out).items():
        assert again[k]['gap_before'] == pytest.approx(was['gap_after'], rel=1e-3)
        assert again[k]['start'] == pytest.approx(was['student'], rel=1e-4)


def test_in_the_table_a_teacher_has_its_own_guidance(world, tmp_path, monkeypatch):
    heard, own = set(), T.pictures
    monkeypatch.setattr(T, 'pictures', lambda who, batch, models, n, w: heard.add((who, w)) or own(
        who, batch, models, n, w))
    world.distil(tmp_path / 'run', teachers=[dict(name='one', lora=world.one, guidance=3.0)],
                 routes=[dict(teacher='one', data='words')], rollout_guidance=1.5, steps=1,
                 max_steps=1, score='jpeg', score_samples=1)
    assert heard == {('base', 1.5), ('one', 3.0), ('student', 1.5)}
