"""Several processes: the same run as one; and what they are told."""
from conftest import *

BOTH = '''
import json, os, shutil, sys, torch.distributed, train_opd, train_teacher
for name, argv in json.loads(sys.argv[1]):
    if name == 'killed after step 1':
        if os.environ['RANK'] == '0':
            shutil.copytree(*argv, symlinks=True)
            [shutil.rmtree(f'{argv[1]}/step_00000{k}') for k in (2, 3)]
        torch.distributed.barrier()
    else:
        (train_opd if name == 'opd' else train_teacher).main(argv)
'''


def test_who_is_interrupted_does_not_wait_for_rewards():
    code = 'import time; from concurrent.futures import ThreadPoolExecutor as P; p = P(1)\n' \
        '[p.submit(time.sleep, 20) for _ in range(3)]\n' \
        'from support.ending import end; end(KeyboardInterrupt("asked to stop"))'
    began, p = time.time(), python('-c', code)
    assert p.returncode == 130 and 'asked to stop' in p.stderr and time.time() - began < 15


def test_a_cluster_says_sigterm_twice_and_ctrl_c_twice_ends_at_once():
    from support.processes import Stop
    stop = Stop()
    try:
        stop.busy = True
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt, match='asked to stop'):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        stop.over()


def test_a_closed_terminal_stops_a_run_unless_it_is_to_stay():
    from support.processes import Stop
    for before, heard in (signal.SIG_DFL, True), (signal.SIG_IGN, False):
        signal.signal(signal.SIGHUP, before)
        stop = Stop()
        stop.busy = True
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        finally:
            stop.over()
        assert stop.asked == heard and signal.getsignal(signal.SIGHUP) == before


def launched(tmp_path, jobs):
    """Runs one after the other, in two processes that torchrun starts."""
    (tmp_path / 'both.py').write_text(BOTH)
    p = python('-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_addr=127.0.0.1',
               f'--master_port={free_port()}', tmp_path / 'both.py', json.dumps(jobs))
    assert p.returncode == 0, p.stderr[-3000:]


def test_two_processes_are_one(world, tmp_path):
    """Gradients after a step, weights after three; all that deals samples differently; and the
    log of a run that two of them resume."""
    more = dict(max_steps=3, save_every=1, ckpt_keep=9, steps=2, eval_samples=2, lr=2e-3)
    grpo = dict(method='grpo', group_size=4, batch_size=16, global_std=True, kl_beta=0.01)
    sdpo = dict(method='sdpo', group_size=2, steps=3, kl_beta=0.01)
    flow = dict(method='flowopd', eta=0.7, group_size=2, updates=2, log_every=2)
    kinds = dict(opd=(T.main, world.opd, flow), grpo=(train_teacher.main, world.teacher, grpo),
                 sdpo=(train_teacher.main, world.teacher, sdpo))
    jobs = [(k, words(tmp_path / f'{k}2', **more | m)) for k, (_, words, m) in kinds.items()]
    whole, half = tmp_path / 'opd2', tmp_path / 'opd2half'
    jobs += [('killed after step 1', [str(whole), str(half)]),
             ('opd', [*world.opd(half, **more | flow), '--init_from=resume'])]
    launched(tmp_path, jobs)
    for k, (main, words, m) in kinds.items():
        one, two = run(main, words(tmp_path / k, **more | m)), tmp_path / f'{k}2'
        a, b = first_gradient(one), first_gradient(two)
        assert a.norm() > 0 and (a - b).norm() < 1e-5 * a.norm()
        moved = weights(one, 3) - weights(one, 0)
        assert (weights(one, 3) - weights(two, 3)).norm() < 1e-3 * moved.norm()
        for e, f in zip(timeless(one), timeless(two), strict=True):
            assert list(e) == list(f)
            assert list(e.values()) == pytest.approx(list(f.values()), rel=1e-3, abs=1e-6)
    same_state(whole, half, 3)
    assert timeless(half) == timeless(whole)


def test_machines_that_do_not_share_the_run_folder_are_told(world, tmp_path):
    """Each would resume from what it finds: nothing, or other weights than the others."""
    out = world.distil(tmp_path / 'run', max_steps=1, steps=1, eval_samples=1)
    env = ONE_THREAD | dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
    argvs = [world.opd(o, max_steps=2, init_from='resume') for o in (out, tmp_path / 'empty')]
    ps = [subprocess.Popen([sys.executable, 'train_opd.py', *argv], cwd=ROOT, text=True,
                           env=env | dict(RANK=str(rank)), stderr=subprocess.PIPE)
          for rank, argv in enumerate(argvs)]
    for p in ps:
        errors = p.communicate(timeout=300)[1]
        assert p.returncode == 2 and 'one folder for all machines' in errors


def test_scorers_are_asked_once_a_picture(monkeypatch):
    images, asked = torch.rand(11, 3, 4, 4), []
    rows = [{'prompt': str(i)} for i in range(11)]

    def judge(images, rows):
        asked.append([int(r['prompt']) for r in rows])
        return images.mean((1, 2, 3)).tolist()
    monkeypatch.setattr(files, 'gather', lambda world, x: x)   # each for itself
    said = [files.judged(judge, images, rows, 3, SimpleNamespace(rank=rank, size=3))
            for rank in range(3)]
    assert sorted(sum(asked, [])) == [*range(11)] and max(map(len, asked)) == 3
    own = images.mean((1, 2, 3))
    assert said == pytest.approx([own[r::3].mean().item() for r in range(3)])
