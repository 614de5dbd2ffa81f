"""bench.py: its rows are those of train_opd's own step."""
import concurrent.futures

from conftest import *

import bench

FEW = ['--device=cpu', '--sizes=24', '--batches=2', '--first_steps=1', '--timed_steps=1']


def rows(said):
    table = [x.strip('| ').split(' | ') for x in said.splitlines() if x.startswith('| ')]
    return [dict(zip(table[0], row)) for row in table[1:]]


def test_a_row_has_what_the_plan_says(capsys):
    bench.main([*FEW, '--switches=plain,checkpointing+float8', '--queries=4'])
    plain, both = rows(capsys.readouterr().out)
    # 3 forwards roll out; at each of 4 states the teacher is asked, and the student with gradient
    assert plain['forwards/sample'] == both['forwards/sample'] == f'{3 + 4 * (1 + 3):.1f}'
    assert both['switches'] == 'checkpointing+float8'
    for row in (plain, both):
        assert float(row['samples/s']) > 0 and float(row['GB']) > 0.1
        assert 20 < int(row['network'].rstrip('%')) <= 100
        product = float(row['samples/s']) * float(row['s/sample'])
        assert product == pytest.approx(1, abs=0.05)


class Full(concurrent.futures.ThreadPoolExecutor):
    """Of a machine without room."""

    def __init__(self, workers, context):
        super().__init__(workers)

    def submit(self, function, c):
        def fails():
            raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
        return super().submit(fails)


def test_what_does_not_fit_is_a_row_and_a_mistake_is_a_sentence(capsys, monkeypatch):
    with pytest.raises(BadInput, match='larger than'):         # of the shapes' table of positions
        bench.main([*FEW, '--sizes=96', '--switches=plain'])
    with pytest.raises(BadInput, match="switches: 'fast' is not one of plain"):
        bench.main([*FEW, '--switches=plain+fast'])
    with pytest.raises(BadInput, match='batches should be'):
        bench.main([*FEW, '--batches=2.5'])
    monkeypatch.setattr(bench, 'ProcessPoolExecutor', Full)
    bench.main([*FEW, '--switches=plain'])
    assert 'CUDA out of memory. Tried to allocate' in capsys.readouterr().out


def test_a_rows_switches_are_on(monkeypatch):
    seen = []

    class Asked(Full):
        def submit(self, function, c):
            seen.append((c.grad_checkpointing, c.compile, c.base_storage))
            return super().submit(function, c)
    monkeypatch.setattr(bench, 'ProcessPoolExecutor', Asked)
    bench.main([*FEW, '--switches=plain,checkpointing+float8,compile'])
    assert seen == [(False, False, ''), (True, False, 'float8'), (False, True, '')]
