"""The networks: the multi-view diffusion U-Net, SVD's frozen parts, and the LGM reconstructor."""
