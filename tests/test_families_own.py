"""A family of one's own, from the guide's own text: docs/families.md."""
import runpy

from conftest import *
from pipelines import *


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    """(the folder of a tiny AuraFlow, aura.py:AuraFlow, check.py) with the guide's files."""
    folder = tmp_path_factory.mktemp('own')
    found = re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / 'families.md').read_text(), re.S)
    for name, text in zip(('aura.py', 'check.py'), found, strict=True):
        (folder / name).write_text(text)
    torch.manual_seed(0)
    net = diffusers.AuraFlowTransformer2DModel(
        num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=64)
    for p in net.parameters():
        p.data += torch.randn_like(p) * 0.1
    words = hf.UMT5EncoderModel(hf.UMT5Config(
        vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0,
        eos_token_id=2))
    pipe = diffusers.AuraFlowPipeline(
        transformer=net, text_encoder=words, tokenizer=tokenizer(256, '$A <eos>'),
        vae=vae(4, 0.13025, None), scheduler=flow(shift=1.73))
    pipe.save_pretrained(folder / 'model')
    return folder / 'model', f'{folder}/aura.py:AuraFlow', folder / 'check.py'


def test_it_is_its_pipeline_by_the_guides_own_check(own, monkeypatch, capsys):
    model, family, check = own
    monkeypatch.chdir(check.parent)
    monkeypatch.setattr(sys, 'argv', ['check.py', str(model)])
    runpy.run_path(str(check))
    worst = float(re.search(r'the largest difference is (\S+)', capsys.readouterr().out)[1])
    assert worst < 1e-4
    spoilt = Path('aura.py').read_text().replace('timestep=sigma', 'timestep=1 - sigma')
    Path('aura.py').with_name('spoilt.py').write_text(spoilt)
    other = check.read_text().replace('aura.py', 'spoilt.py')
    check.with_name('other.py').write_text(other)
    runpy.run_path('other.py')
    assert float(re.search(r'difference is (\S+)', capsys.readouterr().out)[1]) > 1e-2


@torch.no_grad()
def test_it_is_its_pipeline_with_guidance_and_in_batches(own):
    field = T.open_field(str(own[0]), family=own[1], max_sequence_length=LENGTH)
    field.pipe.set_progress_bar_config(disable=True)
    cond, empty = conditions(field, WORDS)
    for n, size, w in ((1, SIZES[0], 3.0), (4, SIZES[1], 1.0), (7, SIZES[0], 3.0)):
        eps = noise(field, 3, size)
        z = T.denoise(lambda batch, z, s: guided(field, z, s, cond, empty, w), cond,
                      field.first_state(eps, n, *size), field.sigmas(n, *size))
        theirs = field.pipe(
            WORDS, latents=eps, num_inference_steps=n, height=size[0], width=size[1],
            guidance_scale=w, max_sequence_length=LENGTH, output_type='latent').images
        assert off(z, theirs) < 1e-4
        swapped = T.denoise(lambda batch, z, s: guided(field, z, s, cond[::-1], empty, w), cond,
                            eps, field.sigmas(n, *size))
        assert off(swapped, theirs) > 1e-3


def test_its_table_of_positions_ends_it(own, tmp_path):
    model, family, _ = own
    argv = [f'--model={model}', f'--family={family}', "--teachers=[dict(name='base')]", '--dry_run',
            "--routes=[dict(teacher='base', data='t2i')]", '--data=["data/examples/t2i.txt"]',
            '--init_from=base', '--batch_size=2', '--micro_batch=2']
    train_opd.main([*argv, '--resolution=128'])                # 8 x 8 tokens
    for size in ('[128, 144]', '[144, 128]'):
        with pytest.raises(BadInput, match='than AuraFlowPipeline.s table of positions, 128'):
            train_opd.main([*argv, f'--resolution={size}'])
    place = T.open_field(str(model), family=family).net.pos_embed
    rows = place.pe_selection_index_based_on_dim(4, 18)        # what the network makes of the first
    assert len(rows.unique()) < len(rows)                      # two tokens, one position


def test_it_trains_and_resumes(own, tmp_path):
    model, family, _ = own
    field = T.open_field(str(model), family=family)
    adapter = {k: (torch.randn(2, m.in_features), torch.randn(m.out_features, 2), 0.1)
               for k, m in field.net.named_modules()
               if isinstance(m, torch.nn.Linear) and k.endswith(('attn.to_q', 'attn.to_v'))}
    merge_lora.write_adapter(tmp_path / 'teacher', adapter)
    argv = [f'--model={model}', f'--family={family}', '--resolution=32', '--device=cpu',
            '--steps=2', '--init_from=base',
            f"--teachers=[dict(name='one', lora='{tmp_path}/teacher')]",
            "--routes=[dict(teacher='one', data='t2i')]", '--data=["data/examples/t2i.txt"]',
            '--batch_size=2', '--micro_batch=2', '--max_steps=2', '--save_every=1', '--ckpt_keep=9',
            '--show=1', '--eval_samples=2', '--sample_steps=2', '--warmup=1', '--rank=2',
            '--alpha=2']
    train_opd.main([*argv, f'--out_dir={tmp_path}/run'])
    shutil.copytree(tmp_path / 'run', tmp_path / 'half', symlinks=True)
    shutil.rmtree(tmp_path / 'half' / 'step_000002')
    train_opd.main([*argv, f'--out_dir={tmp_path}/half', '--init_from=resume'])
    whole, half = (merge_lora.read_adapter(tmp_path / k) for k in ('run', 'half'))
    assert set(whole) > set(adapter) and all(torch.equal(whole[k][1], half[k][1]) for k in whole)


def test_sample_py_verifies_it_as_well(own, capsys):
    """And finds a wrong time; its exit says which."""
    model, family, check = own
    text = Path(family.rpartition(':')[0]).read_text()
    check.with_name('wrong.py').write_text(text.replace('timestep=sigma', 'timestep=1 - sigma'))
    for code, kind in enumerate((family, f'{check.parent}/wrong.py:AuraFlow')):
        with pytest.raises(SystemExit) as end:
            sample.main([f'--model={model}', '--verify', '--height=64', '--width=64',
                         '--dtype=float32', '--device=cpu', f'--family={kind}'])
        assert int(end.value.code) == code, capsys.readouterr().out
