"""What people look at: pages and reports of one HTML file each, without a network.

records       what a report shows of a circuit: its strongest features, where each is active, what they stand for
pictures      activation over an image, arrays as PNG, figures as PNG
render        templates filled in; everything that comes from outside is escaped, every picture lies inside the file
account       what adds up to a graph's targets, by kind of source
page_data     what the viewer's page holds of a graph: a header and columns of numbers
viewer_page   that page: data, the built script and style, and the policy under which a browser runs them
page_server   the page for this machine alone, which takes groups
image_files   images beside a graph: read, kept, put into pages
run_images    the image of a graph's run, made again; needs the model, as nothing else here does
graph_report  a report of any graph
page_labels   what features are called, where nobody said
page_groups   which groups a page opens with, where nobody gave any
notebook      pages in notebooks
widget        what is made in such a page comes back to Python; needs anywidget
page/         sources of the page; `npm run build` there writes bundle/, which ships
"""
