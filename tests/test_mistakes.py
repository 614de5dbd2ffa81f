"""Mistakes: each is named in a sentence, before anything is loaded or written."""
from conftest import *


def broken_adapter(folder, kind):
    """An adapter with one thing wrong, as a single file."""
    path = Path(random_lora(folder, 5)) / merge_lora.FILES[0]
    tensors = dict(load_file(path))
    for other in set(folder.iterdir()) - {path}:
        other.unlink()
    if kind == 'missing':
        tensors.pop('transformer.proj_out.lora_B.weight')
    if kind == 'surplus':
        tensors['transformer.proj_out.diff'] = torch.ones(2)
    if kind == 'other':
        tensors = {k.replace('blocks.3', 'blocks.77'): x for k, x in tensors.items()}
    if kind == 'wide':
        tensors['transformer.proj_out.lora_A.weight'] = torch.ones(2, 999)
    if kind == 'nan':
        tensors['transformer.proj_out.lora_A.weight'][0] = math.nan
    save_file(tensors, path)
    if kind == 'cut':
        path.write_bytes(path.read_bytes()[:-100])
    return str(folder)


def broken(kind):
    """Settings whose teacher 'one' is such an adapter."""
    return lambda w: dict(teachers=[dict(name='one', lora=broken_adapter(w.at / kind, kind))],
                          routes=[dict(teacher='one', data='words')])


def set_to(**settings):
    return lambda w: settings


def one(**more):
    """Settings with one more word at the teacher 'one'."""
    return lambda w: dict(teachers=[dict(name='one', lora=w.one, **more)])


def route(**more):
    return set_to(routes=[dict(dict(teacher='one', data='words'), **more)])


FLOW = dict(method='flowopd', eta=0.7)
MISTAKES = {  # what is said: the settings that are wrong, given the world
    'unknown setting batch_sise, did you mean batch_size': set_to(batch_sise=4),
    "rank should be int, not str 'many'": set_to(rank='many'),
    'nowhere.csv: no such data file': set_to(data=['nowhere.csv']),
    'other.csv: no column "prompt"; it has: text, task': lambda w: dict(
        data=[w.file('other.csv', 'text,task\nhello,words\n')]),
    'source_image .*gone.png does not exist': lambda w: dict(data=[
        str(w.at / 'words.csv'),
        w.file('gone/edits.csv', 'prompt,source_image\nmake it red,gone.png\n')]),
    "bucket 'edits' has no rows; the data has: words": lambda w: dict(
        data=[str(w.at / 'words.csv')]),
    "a route names the teacher 'three'; there are: base, one, two": route(teacher='three'),
    "route 'words': weight must be more than 0, not -2": route(weight=-2),
    'two routes have the same data': set_to(routes=2 * [dict(teacher='one', data='words')]),
    'routes is empty': set_to(routes=[]),
    "two teachers are called 'one'": lambda w: dict(
        teachers=[dict(name='one', lora=w.one), dict(name='one', lora=w.two)]),
    'takes a height in multiples of 4 pixels, not 26; the nearest is 2[48]': set_to(resolution=26),
    'is larger than .* table of positions': set_to(resolution=4800),
    "teacher 'one' belongs to another model.*blocks.77.*no such module": broken('other'),
    r"teacher 'one' belongs to another model.*proj_out \(\(\d+, 999\)": broken('wide'),
    r'factors without their partner: proj_out \(no B\)': broken('missing'),
    'keys that are no LoRA factors.*transformer.proj_out.diff': broken('surplus'),
    'cut.*damaged': broken('cut'),
    'values that are not finite in: .*proj_out.lora_A': broken('nan'),
    'anchor_beta is set but there is no anchor': set_to(anchor_beta=0.04),
    'anchor is set but anchor_beta is 0': set_to(anchor='base'),
    "anchor: no teacher is called 'three'": set_to(anchor='three', anchor_beta=0.04),
    "unknown .'guidence'.; known: name lora": one(guidence=2),
    "teacher 'one': its weight is for mixing = 'soft'": one(weight=2.0),
    "eval_data has no rows of bucket 'words', but of 'wrods', which no route has": lambda w: dict(
        eval_data=[w.file('wrods_val.csv', 'prompt\na red circle on white\n')]),
    "teacher 'one': guidance must be more than 0, not '4.5'": one(guidance='4.5'),
    "teacher 'one' has both lora and checkpoint": one(checkpoint='x'),
    "unknown .'wieght'.; known: teacher data": route(wieght=2),
    "group_size = 1: reward = 'k1_group' compares the samples": set_to(**FLOW, reward='k1_group'),
    'eta = 0: a policy gradient needs a random policy': set_to(method='flowopd'),
    'rollout_guidance and student_guidance must be equal': set_to(**FLOW, rollout_guidance=2.0),
    "kl_var = 'code' is about an SDE's variance": set_to(method='diffusionopd', kl_var='code'),
    "sde = 'cps' ends without noise": set_to(**FLOW, sde='cps'),
    "eta = 2.0: at most 1 with sde = 'cps'": set_to(sde='cps', eta=2.0),
    "sde = 'dance' is about noise: give it an eta": set_to(sde='dance'),
    "dtype: 'float16' is not one of": set_to(dtype='float16'),
    'queries = 5 distinct states cannot be had from 3 steps': set_to(queries=5),
    'from 3 steps, of which drop_last = 1 are left out': set_to(queries=3, drop_last=1),
    'drop_last = 3 leaves nothing of a rollout of 3': set_to(method='diffusionopd', drop_last=3),
    "'one': teachers are dict": set_to(teachers=['one']),
    "'words': teachers are dict.*routes dict": set_to(routes=['words']),
    'samples must be a whole number': route(samples='8'),
    "batch_size is 8, but the routes' samples sum to 6: set it so": route(samples=6),
    "`samples` in a route needs routes_per_step = 'all'": lambda w: dict(
        routes_per_step=1, routes=[dict(teacher='one', data='words', samples=8)]),
    "teacher name 'half': .* none that torch uses": lambda w: dict(
        teachers=[dict(name='half', lora=w.one)]),
    'the name "base" is the frozen base\'s': lambda w: dict(
        teachers=[dict(name='base', lora=w.one)]),
    "init_from = 'merge' needs a route to a LoRA teacher": set_to(
        init_from='merge', routes=[dict(teacher='base', data='words')]),
    "mixing = 'soft' needs routes that all edit, or none": set_to(mixing='soft'),
    'has no target_image': set_to(states='data'),
    r'resolution: a number, or \[height, width\]': set_to(resolution=[24.0, 24]),
    'betas: two numbers from 0 to below 1': set_to(betas=[0.9]),
    'ema_decay must be below 1, not 1.0': set_to(ema_decay=1.0),
    'lr must be more than 0, not 0': set_to(lr=0.0),
    'steps must be at least 1, not 0': set_to(steps=0),
    'out_dir is empty': set_to(out_dir=' '),
    'lora_targets: no linear layer of the model is called to_z': set_to(lora_targets=['to_z'])}


@pytest.mark.parametrize('says', MISTAKES)
def test_a_mistake_is_named_and_nothing_is_written(says, world, tmp_path):
    def file(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    here = SimpleNamespace(at=tmp_path, one=world.one, two=world.two, file=file)
    shutil.copy(world.at / 'words.csv', tmp_path)
    more = dict(out_dir=str(tmp_path / 'out')) | MISTAKES[says](here)
    with pytest.raises(BadInput, match=says):
        T.main([f'--{k}={v!r}' for k, v in settings_of(world, tmp_path, more).items()])
    left = [p for p in (tmp_path / 'out').rglob('*') if p.name not in ('.lock', 'samples')]
    assert not left


def settings_of(world, tmp_path, more):
    words = world.opd(tmp_path / 'out')
    return {k[2:]: eval(v) for k, _, v in (w.partition('=') for w in words)} | more


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / 'bad.py').write_text('steps = 4\nbatch_sise = 4\n')
    p = python('train_opd.py', tmp_path / 'bad.py', f'--out_dir={tmp_path}/out')
    assert p.returncode == 2 and p.stderr.count('\n') == 1
    assert 'bad.py: unknown setting batch_sise, did you mean batch_size?' in p.stderr
    assert not (tmp_path / 'out').exists()


def test_a_teacher_that_equals_the_base_is_refused(world, tmp_path):
    random_lora(tmp_path / 'null', 3, size=0.0)
    teachers = [dict(name='one', lora=world.one), dict(name='two', lora=str(tmp_path / 'null'))]
    with pytest.raises(BadInput, match="teacher 'two' has the velocity of the base"):
        world.distil(tmp_path / 'out', teachers=teachers)


def test_a_full_teacher_that_equals_the_base_is_refused(world, tmp_path):
    full = [dict(name='one', checkpoint=str(SHAPES / 'base'))]
    with pytest.raises(BadInput, match='base has the weights of the base'):
        world.distil(tmp_path / 'out', teachers=full, routes=[dict(teacher='one', data='words')])


def test_a_model_that_lacks_tensors_is_named(world, tmp_path):
    shutil.copytree(SHAPES / 'base', tmp_path / 'base')
    file = next((tmp_path / 'base' / 'transformer').glob('*.safetensors'))
    save_file({k: x for k, x in load_file(file).items() if 'blocks.3.ff' not in k}, file)
    full = [dict(name='one', checkpoint=f'{tmp_path}/base')]
    routes = [dict(teacher='one', data='words')]
    for what, more in (('checkpoint', dict(teachers=full, routes=routes)),
                       ('model', dict(model=f'{tmp_path}/base'))):
        says = f'{what} {tmp_path}/base: .*its weights lack .*blocks.3.ff.*again'
        with pytest.raises(BadInput, match=says):
            world.distil(tmp_path / what, **more)
