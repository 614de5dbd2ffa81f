# Several LoRAs of Z-Image-Turbo into one that still needs eight steps. The rollout has these eight steps,
# so the student is taught exactly at the noise levels where it will be used, by teachers that work in eight
# steps themselves; the bare base answers for ordinary prompts. Nothing here loosens the distillation.
# Where a de-distilled base belongs is before this: imitation on Turbo itself makes it forget its eight
# steps, so train the teachers on Turbo with ostris/zimage_turbo_training_adapter added (merge_lora.py
# --into_base), then use them here on the bare Turbo. As a teacher of this run that adapter would need many
# steps and guidance: left out.
# Memory: about 30 GB at 1024 pixels (estimated: base in bf16 12 GB, adapters of rank 64 and optimizer 3
# GB).
model = 'Tongyi-MAI/Z-Image-Turbo'
family = 'ZImagePipeline'
resolution = 1024
max_sequence_length = 512
teachers = [dict(name='base'), dict(name='portrait', lora='your-name/zimage-turbo-portrait-lora'),
            dict(name='lettering', lora='your-name/zimage-turbo-lettering-lora')]
routes = [dict(teacher='base', data='t2i'), dict(teacher='portrait', data='aesthetic'),
          dict(teacher='lettering', data='ocr')]
routes_per_step = 'sample'
data = ['data/examples/t2i.txt', 'data/examples/aesthetic.txt', 'data/examples/ocr.txt']
eval_data = []                                    # examples to try it; a run wants thousands, some held out

init_from = 'merge'
rank = 64
alpha = 64.0                                      # from here our choice
steps = sample_steps = 8                          # the model card's
rollout_guidance = student_guidance = 1.0         # none, as the model is used
method = 'danceopd'
query = 'stratified'                              # all eight states alike
betas = [0.9, 0.999]                              # torch's own; of betas and warm-up papers say nothing
lr = 1e-4
max_steps = 2000
eval_every = 100
batch_size = 32
micro_batch = 2
grad_checkpointing = True
ema_decay = 0.99
eval_samples = 8
score = ''
out_dir = 'out/zimage_turbo'
