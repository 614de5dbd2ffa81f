# Two rewards learned by Z-Image-Turbo, and the base for ordinary prompts, into one student that
# still needs eight steps: the rollout has these eight, so it is taught exactly at the noise levels
# where it will be used, by teachers that were trained in eight steps themselves. Nothing loosens
# the distillation. (A LoRA that was learned by imitation on Turbo forgets its eight steps, unless
# it was trained on a copy with ostris/zimage_turbo_training_adapter in its transformer/, the folder
# that merge_lora.py --into_base makes.) All is ours.
# Memory, computed, not measured: 30 GB at 1024 pixels (base in bf16 12 GB, adapters of rank 64 and
# the optimizer 3 GB, the rest activations).
_make = 'python train_teacher.py config/teacher_zimage_turbo_sdpo.py'
model = 'Tongyi-MAI/Z-Image-Turbo'
family = 'ZImagePipeline'
resolution = 1024
teachers = [dict(name='base'),
            dict(name='pickscore', lora='out/zimage_turbo_pickscore', make=_make),
            dict(name='clip', lora='out/zimage_turbo_clip',
                 make=_make + ' --reward="[dict(reward=\'clip\')]" --watch_reward=pickscore '
                              '--out_dir=out/zimage_turbo_clip')]
routes = [dict(teacher='base', data='t2i'), dict(teacher='pickscore', data='aesthetic'),
          dict(teacher='clip', data='geneval')]
routes_per_step = 'sample'
data = ['data/examples/t2i.txt', 'data/examples/aesthetic.txt', 'data/examples/geneval.txt']
eval_data = []                              # examples to try it; a run wants thousands

init_from = 'merge'
rank, alpha = 64, 64.0
steps, drop_last, sample_steps = 8, 0, 8    # the model card's
rollout_guidance = student_guidance = 1.0   # none, as the model is used
method = 'danceopd'
query = 'stratified'                        # all eight states alike
betas = [0.9, 0.999]
lr = 1e-4
max_steps = 2000
batch_size, micro_batch = 32, 2
grad_checkpointing = True
ema_decay = 0.99
eval_every, eval_samples, score = 100, 8, ''
out_dir = 'out/zimage_turbo'
