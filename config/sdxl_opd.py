# SDXL, a UNet that predicts noise, through the same flow: a look and a reward into one student,
# with the base for all else. Not in any of the papers: all numbers are ours. Any LoRA of SDXL's
# UNet does.
# Memory, computed, not measured: 20 GB at 1024 pixels (base in bf16 5 GB, adapters of rank 64 and
# the optimizer 2 GB, the rest activations of the two halves of guidance).
_xl = ('--model=stabilityai/stable-diffusion-xl-base-1.0 --family=StableDiffusionXLPipeline '
       '--resolution=1024 ')
model = 'stabilityai/stable-diffusion-xl-base-1.0'
family = 'StableDiffusionXLPipeline'
resolution = 1024
teachers = [dict(name='base', guidance=5.0),  # 5.0: the pipeline's own
            dict(name='style', lora='out/sdxl_style', guidance=5.0,
                 make='python train_teacher.py config/teacher_sd35_style_sft.py '
                      f'{_xl}--out_dir=out/sdxl_style'),
            dict(name='pickscore', lora='out/sdxl_pickscore', guidance=5.0,
                 make=f'python train_teacher.py config/teacher_sd35_grpo.py {_xl}--guidance=5.0 '
                      '--micro_batch=8 --out_dir=out/sdxl_pickscore')]
routes = [dict(teacher='base', data='t2i'), dict(teacher='style', data='geneval'),
          dict(teacher='pickscore', data='aesthetic')]
routes_per_step = 'sample'
data = ['data/examples/t2i.txt', 'data/examples/geneval.txt', 'data/examples/aesthetic.txt']
eval_data = []                              # examples to try it; a run wants thousands

init_from = 'merge'
rank, alpha = 64, 64.0
steps, drop_last = 20, 0
rollout_guidance = student_guidance = 5.0
method = 'danceopd'
query = 'stratified'
betas = [0.9, 0.999]
lr = 1e-4
max_steps = 2000
batch_size, micro_batch = 32, 2
grad_checkpointing = True
ema_decay = 0.99
eval_every, eval_samples, sample_steps = 100, 8, 30
score = ''
out_dir = 'out/sdxl_opd'
