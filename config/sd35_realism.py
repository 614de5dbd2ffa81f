# DanceOPD's realism experiment: a fully fine-tuned SD3.5-medium as the teacher of a LoRA. Theirs is not
# published: any folder or hub id with the transformer of a fine-tuned SD3.5-medium does.
# Memory: about 24 GB at 1024 pixels (estimated: base and teacher in bf16 5 GB each, adapter and optimizer 2
# GB, the rest activations).
model = 'stabilityai/stable-diffusion-3.5-medium'
family = 'StableDiffusion3Pipeline'
resolution = 1024
teachers = [dict(name='realism', checkpoint='your-name/sd35-medium-realism')]
routes = [dict(teacher='realism', data='t2i')]
routes_per_step = 1
data = ['data/examples/t2i.txt']                  # 30 prompts, to try it; a run wants thousands
eval_data = []                                    # [] evaluates on the training rows

init_from = 'base'                                # from here to max_steps as published; no guidance at all
rank = 128
alpha = 128.0
steps = 16
method = 'danceopd'
query = 'low_noise'
betas = [0.9, 0.999]                              # torch's own; of betas and warm-up papers say nothing
lr = 2e-4
lr_schedule = 'constant'
max_steps = 3000
batch_size = 32                                   # 4 accumulated on 8 GPUs; on one 4
micro_batch = 2
grad_checkpointing = True
ema_decay = 0.99                                  # our choice
eval_every, save_every = 300, 50
eval_samples = 8
sample_steps = 28
score = ''
out_dir = 'out/sd35_realism'
