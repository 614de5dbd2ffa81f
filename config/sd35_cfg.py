# Guidance as a teacher (DanceOPD's operator field): the base with guidance 3.5 is distilled into a
# student without any, so that a picture takes half the forwards. What is absorbed and what is
# added when sampling compound: published best are 3.5 absorbed and 2.0 when sampling (sample.py
# --guidance=2.0); 1.0 is the fast way. Nothing but the base is needed: it runs as it is.
# Memory, computed, not measured: 18 GB at 1024 pixels (base in bf16 5 GB, adapter and optimizer 2
# GB, the rest activations).
model = 'stabilityai/stable-diffusion-3.5-medium'  # gated: accept its licence, then hf auth login
family = 'StableDiffusion3Pipeline'
resolution = 1024
teachers = [dict(name='base', guidance=3.5)]
routes = [dict(teacher='base', data='t2i')]
data = ['data/examples/t2i.txt']            # 30 prompts, to try it; a run wants thousands
eval_data = []                              # [] evaluates on the training rows

init_from = 'base'
rank = 128                                  # from here to max_steps DanceOPD's
alpha = 128.0
steps, drop_last = 16, 0
rollout_guidance = student_guidance = 1.0
method = 'danceopd'
query = 'low_noise'
betas = [0.9, 0.999]                        # ours: torch's; warm-up and average are ours too
lr = 2e-4
lr_schedule = 'constant'                    # ours: nothing is said
max_steps = 3000
batch_size = 32                             # published: 4 accumulated; ours: on 8 GPUs
micro_batch = 2                             # ours, as all below
grad_checkpointing = True
ema_decay = 0.99
eval_every, save_every, eval_samples, sample_steps = 300, 50, 8, 28
score = ''
out_dir = 'out/sd35_cfg'
