"""Student and teachers as adapters on a family's network, and adapter files."""
from conftest import *
from pipelines import *


def random_adapter(net, targets, seed, rank=4, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    found = {k: m.weight for k, m in net.named_modules()
             if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
             and any(k.endswith('.' + t) for t in targets)}

    def draw(*shape):
        return torch.randn(shape, generator=g) * 0.2
    return {k: (draw(rank, *w.shape[1:]), draw(len(w), rank, *[1] * (w.dim() - 2)), scale)
            for k, w in found.items()}


def probe(field, folder=None):
    """States and conditions to ask for velocities at."""
    given = sources(field, SIZES[0], folder, 2) if folder and field.can_edit else []
    cond, _ = conditions(field, WORDS[:2], given)
    return noise(field, 2, SIZES[0]), torch.tensor([0.8, 0.3]), cond


LEARNER = SimpleNamespace(rank=3, alpha=6.0, seed=0, betas=(0.9, 0.99), weight_decay=0.0,
                          ema_decay=0.0, ema_every=1)


def ask(models, who, z, s, cond):
    return models.velocity(who, [SimpleNamespace(cond=c) for c in cond], z, s)


def targets_of(field, name):
    return [*field.targets, *['conv1', 'proj_in'] * (name in UNETS)]


def household(name, tmp_path):
    """Two teachers and a student on a field: (field, models, student, probe, the base's v). On a
    UNet they have convolutions as well, the student by its start."""
    field = build(name)
    targets = targets_of(field, name)
    at = probe(field, tmp_path)
    with torch.no_grad():
        bare = field.velocity(*at)
    for i in range(2):
        adapter = random_adapter(field.net, targets, i)
        merge_lora.write_adapter(tmp_path / f't{i}', adapter, prefix=field.prefix)
    models = T.Models(field, [dict(name=k, lora=str(tmp_path / k)) for k in ('t0', 't1')])
    start = adapter if name in UNETS else None
    student = M.Student(field.net, LEARNER, sorted(start or field.targets), start)
    assert any(p.dim() == 4 for p in student.params.values()) == (name in UNETS)
    models.refresh(), models.switch('student')
    torch.manual_seed(5)
    for p in student.params.values():                          # as after some training
        p.data.normal_(0, 0.2)
    return field, models, student, at, bare


@pytest.mark.parametrize('name', EACH)
def test_student_and_teachers_share_a_base(name, tmp_path):
    field, models, student, at, bare = household(name, tmp_path)
    calls = []
    watched = field.net.get_submodule(student.names[0]).lora_A['student']
    watched.register_forward_hook(lambda *a: calls.append(1))

    def gradients(between):
        v = ask(models, 'student', *at)
        with torch.no_grad():
            for who in between:
                ask(models, who, *at)
        seen = len(calls)
        v.square().sum().backward()
        grads = {n: p.grad.clone() for n, p in student.params.items() if p.grad is not None}
        for n, p in field.net.named_parameters():
            assert '.student.' in n or (p.grad is None and not p.requires_grad)
            p.grad = None
        return v.detach(), grads, len(calls) - seen

    v, alone, _ = gradients([])
    idle = {n for n in student.params if n not in alone or not alone[n].any()}
    assert all('.1.attn.add_q_proj.' in n for n in idle)       # SD3 drops the last block's words
    _, among, again = gradients(['t0', 'base', 't1'])
    assert again == 0 and all(torch.equal(alone[n], among[n]) for n in alone)
    field.net.enable_gradient_checkpointing()
    _, recomputed, again = gradients(['t0', 't1', 'base'])
    assert again > 0, 'nothing was recomputed: checkpointing was off'
    assert all(torch.allclose(alone[n], recomputed[n], rtol=1e-5, atol=1e-6) for n in alone)

    with torch.no_grad():
        assert torch.equal(ask(models, 'base', *at), bare)    # bit for bit
        teachers = [ask(models, f't{i}', *at) for i in range(2)]
        assert torch.equal(ask(models, 'student', *at), v)
    for i, t in enumerate(teachers):                           # as with deltas added to the weights
        other = build(name)
        for k, (A, B, scale) in random_adapter(other.net, targets_of(other, name), i).items():
            w = other.net.get_submodule(k).weight
            w.data += scale * (B.flatten(1) @ A.flatten(1)).view_as(w)
        with torch.no_grad():
            assert off(other.velocity(*at), t) < 1e-4 * (1 + t.abs().max())
        assert off(t, bare) > 1e-2 and off(t, v) > 1e-2
    assert off(*teachers) > 1e-2 and off(v, bare) > 1e-2


def test_default_layers_are_those_that_count():
    """FLUX.2's to_out is a layer in its single blocks alone; Qwen's last words are not used."""
    names = {k: M.Student(build(k).net, LEARNER, shared(k).targets).names
             for k in ('klein', 'qwen')}
    attn = [f'attn.{k}' for k in ('to_q', 'to_k', 'to_v', 'to_out.0')]
    alone = [f'single_transformer_blocks.0.attn.{k}' for k in ('to_out', 'to_qkv_mlp_proj')]
    assert names['klein'] == sorted([f'transformer_blocks.0.{k}' for k in attn] + alone)
    assert names['qwen'] == sorted(f'transformer_blocks.{i}.{k}' for i in range(2) for k in attn)


def test_in_bfloat16_a_layer_of_the_student_reads_what_the_base_reads(tmp_path):
    """PEFT would copy each input to float32, which autocast rounds back: the same numbers."""
    field, models, student, (z, s, cond), _ = household('sd3', tmp_path)
    field.net.to(torch.bfloat16), setattr(field, 'dtype', torch.bfloat16)
    for p in student.params.values():
        p.data = p.data.float()
    seen = []
    watched = field.net.get_submodule(student.names[0]).lora_A['student']
    watched.register_forward_hook(lambda m, x, y: seen.append((x[0].dtype, y.dtype)))
    v = ask(models, 'student', z, s, cond)
    for layer in models.layers:
        layer.cast_input_dtype_enabled = True
    assert torch.equal(ask(models, 'student', z, s, cond), v)
    assert seen == [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize('name', EACH)
def test_a_saved_student_loads_in_diffusers_and_peft(name, tmp_path):
    from peft import PeftModel, get_peft_model_state_dict
    field, models, student, at, bare = household(name, tmp_path)
    student.ema = {n: p.detach() * 0.5 for n, p in student.params.items()}
    student.save(tmp_path / 'saved', field.prefix)
    with torch.no_grad():
        now = ask(models, 'student', *at)
        with student.wearing(student.ema):
            average = ask(models, 'student', *at)
        assert torch.equal(ask(models, 'student', *at), now) and off(now, average) > 1e-2
        student.ema, mean = None, student.ema                  # without an average: the student
        student.save(tmp_path / 'itself', field.prefix)
        for folder, v in ((tmp_path / 'itself', now), (tmp_path / 'saved', average)):
            for load in (lambda f: f.pipe.load_lora_weights(str(folder)),
                         lambda f: PeftModel.from_pretrained(f.net, str(folder)),
                         lambda f: T.Models(f, [dict(name='x', lora=str(folder))])):
                other = build(name)
                load(other)
                there, = {n.split('.')[-2] for n, _ in other.net.named_parameters()
                          if '.lora_A.' in n}
                got = get_peft_model_state_dict(other.net, adapter_name=there)
                tensors = student.tensors() if folder.name == 'itself' else mean
                tensors = {n.replace('.student.', '.'): x for n, x in tensors.items()}
                assert set(tensors) == set(got)
                assert all(torch.equal(got[n], x) for n, x in tensors.items())
                assert off(other.velocity(*at), v) < 1e-5      # a sum's order depends on alignment


@pytest.mark.parametrize('name', EACH)
def test_adapters_of_every_packaging_load_exactly(name, tmp_path):
    field = build(name)
    at = probe(field)
    targets = targets_of(field, name)                          # convolutions as well
    adapter, rank, alpha = random_adapter(field.net, targets, 3), 4, 8.0
    whole = tmp_path / 'whole'
    merge_lora.write_adapter(whole, adapter, alpha, field.prefix)
    paths = [tmp_path / k for k in ('peft', *(f'{k}.safetensors' for k in ('diffusers', 'a', 'b')))]
    paths[0].mkdir()
    for f in ('adapter_model.safetensors', 'adapter_config.json'):
        shutil.copy(whole / f, paths[0])
    shutil.copy(whole / 'pytorch_lora_weights.safetensors', paths[1])
    for path, name_of, a, b in (
            (paths[2], lambda k: f'diffusion_model.{k}', 'lora_A', 'lora_B'),
            (paths[3], lambda k: 'lora_unet_' + k.replace('.', '_'), 'lora_down', 'lora_up')):
        parts = {k: {f'{a}.weight': A, f'{b}.weight': B, 'alpha': torch.tensor(alpha)}
                 for k, (A, B, _) in adapter.items()}
        save_file({f'{name_of(k)}.{part}': x for k, own in parts.items()
                   for part, x in own.items()}, path)
    models = T.Models(field, [dict(name=f't{i}', lora=str(p)) for i, p in enumerate(paths)])
    other = build(name)
    for k, (A, B, scale) in adapter.items():
        w = other.net.get_submodule(k).weight
        w.data += scale * (B.flatten(1) @ A.flatten(1)).view_as(w)
    with torch.no_grad():
        vs, merged = [ask(models, f't{i}', *at) for i in range(4)], other.velocity(*at)
        bare = ask(models, 'base', *at)
    assert all(off(v, vs[0]) < 1e-5 for v in vs)               # a sum's order depends on alignment
    for k, (A, B, scale) in adapter.items():
        layer = field.net.get_submodule(k)
        for t in (f't{i}' for i in range(4)):
            assert torch.equal(layer.lora_A[t].weight, A) and torch.equal(layer.lora_B[t].weight, B)
            assert layer.scaling[t] == scale
    assert off(vs[0], merged) < 1e-4 * (1 + merged.abs().max()) and off(vs[0], bare) > 1e-2

    key = sorted(adapter)[0]
    A, B, scale = adapter[key]
    misfit = torch.ones(rank, A.shape[1] + 1), B.flatten(1), scale
    wrong = {**adapter, 'no.such_layer': adapter[key], key: misfit}
    merge_lora.write_adapter(tmp_path / 'wrong', wrong, alpha)
    with pytest.raises(BadInput, match='2 of .* do not fit') as e:
        T.Models(build(name), [dict(name='stranger', lora=str(tmp_path / 'wrong'))])
    assert 'stranger' in str(e.value) and re.search('no.such.layer', str(e.value))
    assert key in str(e.value)
