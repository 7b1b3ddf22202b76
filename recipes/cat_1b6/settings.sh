# Sourced by torchrun.sh and slurm.sh: settings shared by every start of the published run. SHARDS is the folder of the packed sets.
: "${SHARDS:?the folder that holds the packed sets speech, music and sound, on a file system that all machines share}"
settings=(
    experiment=cat_1b6
    "data.train=[$SHARDS/speech,$SHARDS/music,$SHARDS/sound]"
    checkpoint.every_updates=6000 # 35 minutes on 64 GPUs, see README.md
    checkpoint.keep_every_updates=60000
    trainer.reduce_dtype=bf16
)
