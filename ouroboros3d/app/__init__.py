"""The web app: upload a picture, watch the loop step by step, download the object in any format.

port.py     what is checked before anything is loaded
server.py   starts and stops Gradio: folder, port, limits
page.py     what the page shows and which function each event calls
jobs.py     the work behind it: cut-outs, the loop on one device, files
panel.py    the recursion player (ouroboros3d/export/web) as a Gradio component
"""
