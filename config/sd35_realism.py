# DanceOPD's realism experiment: a fully fine-tuned SD3.5-medium as the teacher of a LoRA. Theirs
# is not published. Any folder or hub id with the transformer of a fine-tuned SD3.5-medium does;
# without one, `make` is a rehearsal: a LoRA learned from pictures, added to the base's weights.
# Memory, computed, not measured: 24 GB at 1024 pixels (base and teacher in bf16 5 GB each, adapter
# and optimizer 2 GB, the rest activations); teacher_offload = True keeps the teacher on the CPU
# meanwhile.
_base = 'hf download -q stabilityai/stable-diffusion-3.5-medium --include "transformer/*"'
model = 'stabilityai/stable-diffusion-3.5-medium'  # gated: accept its licence, then hf auth login
family = 'StableDiffusion3Pipeline'
resolution = 1024
teachers = [dict(name='realism', checkpoint='out/sd35_realism_full',
                 make='python train_teacher.py config/teacher_sd35_style_sft.py && '
                      'python merge_lora.py --adapters=out/sd35_style '
                      f'--into_base="$({_base})" --out=out/sd35_realism_full')]
routes = [dict(teacher='realism', data='t2i')]
data = ['data/examples/t2i.txt']            # 30 prompts, to try it; a run wants thousands
eval_data = []                              # [] evaluates on the training rows

init_from = 'base'                          # from here to max_steps as published
rollout_guidance = student_guidance = 1.0
rank = 128
alpha = 128.0
steps, drop_last = 16, 0
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
out_dir = 'out/sd35_realism'
