"""Prompts' embeddings: all that is needed, within a limit; and whose turn on the device it is."""
from contextlib import contextmanager

from conftest import *

ONE = 4 * 100                                                  # bytes of an embedding here


class Encoder:
    """A family that counts what it is asked, and a network that counts when it is sent away."""
    sees_source, device = False, torch.device('cpu')

    def __init__(self):
        self.seen, self.visits, self.field, self.gone = [], 0, self, False

    @contextmanager
    def away(self):
        self.visits += 1
        yield

    def encode(self, *key):
        self.seen.append(key)
        return dict(text=torch.full((100,), float(len(self.seen))))

    def encode_source(self, path, height, width):
        return dict(source=path)

    def drop_encoders(self):
        self.gone = True


def row(prompt, source=''):
    return dict(prompt=str(prompt), source_image=source)


def keys(*prompts):
    return [(str(p), False) for p in prompts]


def room_for(n):
    return Encoder(), n * ONE / 1e9


def test_a_prompt_is_encoded_once_and_an_edits_has_its_own():
    net, gb = room_for(100)
    prompts = M.Prompts(net, gb)
    samples = [T.Sample(r, (8, 8), None) for r in (row('a'), row('b'), row('a'), row('a', 'x.png'))]
    prompts.condition(samples)
    assert sorted(net.seen) == [('', False), ('', True), ('a', False), ('a', True), ('b', False)]
    assert net.visits == 1
    prompts.condition(samples[:2])
    assert len(net.seen) == 5 and net.visits == 1
    a, b, again, edit = samples
    assert a.cond['text'] is again.cond['text'] and a.empty['text'] is b.empty['text']
    assert a.cond['text'][0] != edit.cond['text'][0] != a.empty['text'][0]
    assert edit.cond['source'] == edit.empty['source'] == 'x.png' and 'source' not in a.cond


def test_where_words_see_the_source_each_source_has_its_own():
    net, gb = room_for(100)
    net.sees_source = True
    prompts = M.Prompts(net, gb)
    prompts.condition([T.Sample(row('a', x), (8, 8), None) for x in ('x.png', 'y.png')])
    assert sorted(net.seen) == [('', 'x.png'), ('', 'y.png'), ('a', 'x.png'), ('a', 'y.png')]


@pytest.mark.parametrize('most', [1, 7, 20, 200])
def test_what_is_needed_is_there_and_never_more_than_the_limit_and_a_batch(most):
    net, gb = room_for(most)
    prompts, r = M.Prompts(net, gb), random.Random(most)
    steps = [[str(r.randrange(60)) for _ in range(5)] for _ in range(80)]
    prompts.expect(row(p) for step in steps for p in step)
    peak, encode = [], net.encode

    def watched(*key):
        peak.append(prompts.bytes + ONE)
        return encode(*key)
    net.encode = watched
    for step in steps:
        needed = keys(*step)
        prompts.add(needed)
        assert all(k in prompts.known for k in needed)
        assert prompts.bytes == ONE * len(prompts.known)
    assert max(peak) <= (most + 5) * ONE
    if most >= 60:
        assert net.visits == 1 and len(net.seen) == 1 + len({*sum(steps, [])})   # and no words
    if most == 20:                                             # visits bring what comes next
        assert net.visits < 30


def test_what_was_lately_used_stays():
    net, gb = room_for(8)
    prompts = M.Prompts(net, gb)
    prompts.add(keys(0, 1, 2, 3))
    prompts.condition([T.Sample(row(0), (8, 8), None)])        # with its empty words: five
    assert [*prompts.known] == keys(1, 2, 3, 0, '')
    prompts.add(keys(4))
    assert [*prompts.known] == keys(2, 3, 0, '', 4)


@pytest.mark.parametrize('sees', [False, True])
def test_what_a_run_evaluates_on_drives_out_nothing(sees):
    """A cache that is smaller than the data, with evaluations between the steps: the encoders come
    when it is empty, and not for every batch from the first evaluation on."""
    net, gb = room_for(100)
    net.sees_source, each = sees, 2 if sees else 1
    prompts, r = M.Prompts(net, gb), random.Random(0)
    rows = [row(i, f'{i}.png') for i in range(2000)]
    held = [row(f'held {i}', f'{i}.png') for i in range(8)]
    prompts.begin(held, dict(x=rows))
    steps = [[r.choice(rows) for _ in range(8)] for _ in range(100)]
    prompts.expect(x for step in steps for x in step)
    for i, step in enumerate(steps):
        if i % 10 == 0:
            for few in (held[:4], held[4:]):
                prompts.condition([T.Sample(x, (8, 8), None) for x in few])
        for few in (step[:4], step[4:]):
            prompts.condition([T.Sample(x, (8, 8), None) for x in few])
    assert len(set(net.seen)) <= len(net.seen) < each * 1.1 * 800 + 16 + each
    assert net.visits < 2 + each * 800 / 40                    # half of the room at a time, or more


def test_data_that_has_room_is_encoded_at_once_and_the_encoders_go():
    buckets = dict(x=[row(i) for i in range(9)], y=[row('a', 'x.png')])
    for most, gone in ((13, True), (9, False)):
        net, gb = room_for(most)
        prompts = M.Prompts(net, gb)
        prompts.begin([row('held')], buckets)
        assert net.gone == gone and bool(prompts.lacks) != gone
        assert len(net.seen) == (13 if gone else 2)            # 9 + 1, what is held, 2 of no words
        assert net.visits == (2 if gone else 1)


def test_embeddings_of_a_real_encoder_do_not_depend_on_company():
    models = T.Models(T.open_field(str(SHAPES / 'base')))
    prompts = M.Prompts(models, 1.0)
    prompts.add(keys('a red circle', 'two green squares and a blue triangle'))
    alone = models.field.encode('a red circle')
    for k, x in prompts.known['a red circle', False].items():
        assert torch.equal(x, alone[k])
    assert prompts.bytes == sum(x.nbytes for found in prompts.known.values()
                                for x in found.values())


def test_a_run_whose_prompts_do_not_fit_says_so_and_has_the_same_losses(world, tmp_path, capsys):
    want = world.distil(tmp_path / 'whole', max_steps=3, steps=2, eval_samples=1)
    assert 'do not fit' not in capsys.readouterr().out
    got = world.distil(tmp_path / 'visits', max_steps=3, steps=2, eval_samples=1, cache_gb=1e-5)
    assert log(got, 'loss') == log(want, 'loss')
    assert re.search('words +up to .* do not fit in cache_gb = 1e-05 of each process: its enco',
                     capsys.readouterr().out)


# -------------------- whose turn it is
HERE = torch.device('cpu:0')                                   # the device of these runs; not 'cpu'


class Turns:
    """Which networks and text encoders are on the device, at every moment."""

    def __init__(self, monkeypatch):
        self.here, self.encoded, self.crowd, self.visits = {}, 0, 0, 0
        to = torch.nn.Module.to
        encode, velocity = T.SD3.encode, T.Field.velocity

        def moved(module, *a, **k):
            kind = type(module).__name__
            if 'TextModel' in kind or 'T5Encoder' in kind or 'Transformer2D' in kind:
                for x in a:
                    if isinstance(x, (str, torch.device)):
                        self.here[id(module)] = kind if torch.device(x) == HERE else ''
                        self.visits += 'T5' in self.here[id(module)]
                self.look()
            return to(module, *a, **k)

        def encoding(field, *a):
            self.encoded += 1
            assert not self.nets() and len(self.encoders()) == 3
            return encode(field, *a)

        def asked(field, *a):
            assert field.net is not None and self.here[id(field.net)] and not self.encoders()
            return velocity(field, *a)
        monkeypatch.setattr(torch.nn.Module, 'to', moved)
        monkeypatch.setattr(T.SD3, 'encode', encoding)
        monkeypatch.setattr(T.Field, 'velocity', asked)

    def nets(self):
        return [k for k in self.here.values() if 'Transformer' in k]

    def encoders(self):
        return [k for k in self.here.values() if k and 'Transformer' not in k]

    def look(self):
        assert not (self.nets() and self.encoders()), self.here.values()
        self.crowd = max(self.crowd, len(self.nets()))


@pytest.mark.parametrize('offload', [False, True])
@pytest.mark.parametrize('cache_gb', [4.0, 1e-5], ids=['room', 'no room'])
def test_text_encoders_and_networks_are_never_there_together(cache_gb, offload, world, tmp_path,
                                                             monkeypatch):
    """Nor is a waiting teacher of full weights, but when it is asked."""
    merge_lora.main([f'--adapters={world.one}', f'--into_base={SHAPES}/base',
                     f'--out={tmp_path}/full/'])
    turns = Turns(monkeypatch)
    out = world.distil(tmp_path / 'run', device='cpu:0', cache_gb=cache_gb, max_steps=4, steps=1,
                       batch_size=4, eval_samples=1,
                       teachers=[dict(name='full', checkpoint=f'{tmp_path}/full')],
                       routes=[dict(teacher='full', data='words')], teacher_offload=offload)
    assert len(log(out, 'loss')) == 4 and turns.crowd == 2
    assert len(turns.nets()) == (1 if offload else 2)          # in the end it waits on the CPU
    if cache_gb == 4.0:                                        # what is held, then all of the data
        assert turns.visits == 2 and turns.encoded == 9
    else:
        assert turns.visits > 3
