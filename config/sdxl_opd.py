# SDXL, a UNet that predicts noise, through the same flow: style LoRAs into one, with the base as an anchor.
# Not in any of the papers: all numbers are our choice. LoRA files must have diffusers' names
# (load_lora_weights and save_lora_weights once, if they have those of the first release).
# Memory: about 20 GB at 1024 pixels (estimated: base in bf16 5 GB, adapters of rank 32 and optimizer 1 GB,
# the rest activations of two halves of guidance).
model = 'stabilityai/stable-diffusion-xl-base-1.0'
family = 'StableDiffusionXLPipeline'
resolution = 1024
teachers = [dict(name='base', guidance=5.0),
            dict(name='photo', lora='your-name/sdxl-photo-lora', guidance=5.0),
            dict(name='ink', lora='your-name/sdxl-ink-lora', guidance=5.0)]  # 5.0: the pipeline's own
routes = [dict(teacher='base', data='t2i'), dict(teacher='photo', data='aesthetic'),
          dict(teacher='ink', data='geneval')]
routes_per_step = 'sample'
data = ['data/examples/t2i.txt', 'data/examples/aesthetic.txt', 'data/examples/geneval.txt']
eval_data = []                                    # examples to try it; a run wants thousands

init_from = 'merge'
rank = 32
alpha = 32.0
steps = 20
rollout_guidance = student_guidance = 5.0
method = 'danceopd'
query = 'low_noise'
betas = [0.9, 0.999]                              # torch's own; of betas and warm-up papers say nothing
lr = 1e-4
max_steps = 2000
eval_every = 100
batch_size = 32
micro_batch = 2
grad_checkpointing = True
ema_decay = 0.99
eval_samples = 8
sample_steps = 30
score = ''
out_dir = 'out/sdxl_opd'
