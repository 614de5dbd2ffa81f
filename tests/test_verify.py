"""sample.py --verify: a family that is its pipeline's is found the same, and a wrong one is not."""
import contextlib

from conftest import *
from pipelines import *
from support import verify as V
from train_opd import Models, Sample

OURS = 'a red ball on a green cube'
EDITORS = 'omni', 'kontext', *FLUX2S, *SHOWN


def look(field, who='base', adapter=None):
    """(the verdict, the printed lines by their heads)."""
    models, out = Models(field), io.StringIO()
    if adapter:
        M.attach(field.net, who, adapter)
        models.refresh()
    sample = Sample(dict(prompt=OURS, source_image=''), LARGER[0], None)
    with contextlib.redirect_stdout(out):
        same = V.verify(T.pictures, models, who, sample, 4)
    lines = {x[:18].strip(): x[18:].strip() for x in out.getvalue().splitlines()[1:]}
    return same, lines


@pytest.mark.parametrize('name', [*NATIVE, *SHOWN])
def test_every_family_is_its_pipeline(name):
    same, lines = look(shared(name))
    verdicts = {k: x.split(':')[0] for k, x in lines.items() if ':' in x and k[:4] in 'text edit'}
    assert same and lines['The same.'] == ''
    assert lines['encode and decode'].startswith('same')
    assert ('edit' in verdicts) == (name in EDITORS or name.startswith('sd3'))
    told = {k: 'same' if name in EDITORS or k[:4] == 'text' else 'not verifiable' for k in verdicts}
    if name in SHOWN:                                          # whose words need a source
        told |= {k: 'not verifiable' for k in told if k.startswith('text')}
    if name == 'flux2':                                        # no guidance but the embedded one
        told |= {k: 'not verifiable' for k in told if 'guidance' in k}
    assert verdicts == told


def wrong_sign(field):
    forward = field.forward
    field.forward = lambda *a: -forward(*a)


def wrong_time(field):
    forward = field.forward
    field.forward = lambda z, s, cond: forward(z, (1 - s).clamp(0.01, 0.99), cond)


def wrong_schedule(field):
    sigmas = field.sigmas
    field.sigmas = lambda *a: sigmas(*a) ** 1.5


def wrong_guidance(field):
    guide = field.guide
    field.guide = lambda v, v_empty, w: guide(v, v_empty, w - 1)


def wrong_scale(field):
    encode = field.encode_image
    field.encode_image = lambda x: 1.05 * encode(x)


def wrong_shape(field):
    shape = field.shape
    field.shape = lambda h, w: shape(h, w + 16)


# what is found different, in which lines at least
WRONG = {wrong_sign: 'text', wrong_time: 'text', wrong_schedule: 'text', wrong_shape: 'text',
         wrong_guidance: 'text, guidance 3', wrong_scale: 'encode and decode'}


@pytest.mark.parametrize('wrong', WRONG)
@pytest.mark.parametrize('name', ['sd3', 'zimage', 'flux', 'klein', 'qwen', 'sd15', 'sdxl'])
def test_a_mistake_is_found(name, wrong):
    field = build(name)
    wrong(field)
    same, lines = look(field)
    assert not same and 'NOT the same.' in lines
    assert lines[WRONG[wrong]].startswith('DIFFERENT')


def test_a_source_that_is_not_the_pipelines_is_found():
    field = build('kontext')
    source = field.encode_source
    field.encode_source = lambda *a: {'source': source(*a)['source'].flip(2)}
    same, lines = look(field)
    assert not same and lines['text'].startswith('same') and lines['edit'].startswith('DIFFERENT')


@pytest.mark.parametrize('name', ['sd3', 'zimage', 'klein', 'sdxl'])
def test_in_bfloat16_rounding_is_allowed_and_a_sign_is_not(name):
    for wrong in (None, wrong_sign):
        field = build(name)
        field.net.bfloat16()
        for k, m in field.pipe.components.items():
            if k.startswith('text_encoder') and m is not None:
                m.bfloat16()
        field.dtype = field.net.dtype
        if wrong:
            wrong(field)
        same, lines = look(field)
        assert same == (wrong is None) and any('--dtype=float32' in x for x in lines.values())
        assert field.vae.dtype == torch.float32                # as it was before
        if not wrong:                                          # the allowance is not in vain
            assert float(lines['text'].split()[3]) > V.EXACT


@pytest.mark.parametrize('name', ['sd3', 'flux', 'klein', 'flux2', 'qwen'])
def test_in_bfloat16_the_network_is_told_the_very_times_of_the_pipeline(name):
    field, seen = build(name), []
    for k, m in field.pipe.components.items():
        if m is field.net or k.startswith('text_encoder') and m is not None:
            m.bfloat16()
    field.dtype = field.net.dtype
    field.net.register_forward_pre_hook(                       # which rounds them so at once
        lambda m, a, k: seen.append(k['timestep'].bfloat16()[0].item()), with_kwargs=True)
    given = Sample(dict(prompt=OURS, source_image=''), SIZES[1], None)
    V.drawn(T.pictures, Models(field), 'base', given, 20, 1.0)
    assert seen[:20] == seen[20:] and len(set(seen)) == 20


def test_an_adapter_is_on_the_network_that_both_use():
    field = build('flux')
    g = torch.Generator().manual_seed(0)
    adapter = {k: (torch.randn(2, m.in_features, generator=g) / 2,
                   torch.randn(m.out_features, 2, generator=g) / 2, 1.0)
               for k, m in field.net.named_modules() if k.endswith(('to_q', 'to_v'))}
    same, lines = look(field, 'student', adapter)
    assert same and lines['text'].startswith('same')
    models = Models(field)
    given = Sample(dict(prompt=OURS, source_image=''), SIZES[1], None)
    with torch.no_grad():
        of = {who: V.drawn(T.pictures, models, who, given, 4, 1.0)[:2]
              for who in ('base', 'student')}
    for one, other in zip(of['base'], of['student']):          # it acts, in ours and in theirs
        assert (one - other).abs().max() > 5 * V.EXACT
    switch = models.switch
    models.switch = lambda who: switch('base')                 # as if it were not put on
    with torch.no_grad():
        off = V.drawn(T.pictures, models, 'student', given, 4, 1.0)[0]
    assert (off - of['student'][1]).abs().max() > 5 * V.EXACT


def test_what_no_pipeline_does_is_not_called_the_same():
    same, lines = look(shared('sd3-wide'))
    assert not same and 'Nothing was compar' in lines
    field = build('sd3')
    field.pipe.encode_prompt = lambda *a, **k: 1 / 0
    field.encode = lambda p, s='': shared('sd3').encode(p, s)
    same, lines = look(field)
    assert not same and 'its pipeline failed, ZeroDivisionError' in lines['text']


def test_schedulers_that_draw_noise_are_compared_without_it():
    field = build('sd-turbo')
    kind = diffusers.EulerAncestralDiscreteScheduler
    field.pipe.scheduler = kind.from_config(field.pipe.scheduler.config)
    again = T.find_family('StableDiffusionPipeline')(field.pipe, 'cpu', LENGTH)
    assert look(again)[0] and type(field.pipe.scheduler) is kind


OWN = """
import train_opd

class Right(train_opd.SD3):
    pass

class Flipped(train_opd.SD3):
    def forward(self, z, sigma, cond):
        return -super().forward(z, sigma, cond)

class Backwards(train_opd.SD3):
    def forward(self, z, sigma, cond):
        return super().forward(z, 1 - sigma, cond)
"""


@pytest.mark.parametrize('name', ['', 'Right', 'Flipped', 'Backwards'])
def test_a_family_of_ones_own_from_the_command_line(name, tmp_path, capsys):
    (tmp_path / 'own.py').write_text(OWN)
    words = ['--model=data/shapes/base', '--ckpt=data/shapes/teachers/count', '--device=cpu',
             f'--out_dir={tmp_path}/out', '--verify']
    with pytest.raises(SystemExit) as end:
        sample.main([*words, *[f'--family={tmp_path}/own.py:{name}'] * bool(name)])
    said = capsys.readouterr().out
    good = name in ('', 'Right')
    assert end.value.code == (0 if good else 1), said
    assert said.splitlines()[-1] == ('The same.' if good else 'NOT the same.')
    assert not (tmp_path / 'out').exists()                     # nothing is drawn
