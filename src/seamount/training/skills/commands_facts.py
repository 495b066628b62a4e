# ruff: noqa: E501 - tables of wordings are read best with a wording on one line
"""The facts behind skill `commands`: for each topic the answer (English, Chinese) and its question's wordings.

Wordings are parted by `|`, six for each language, English first. Every answer here must be true of the released
program. Called by `training.skills.commands`.
"""

from __future__ import annotations

Topic = tuple[tuple[str, str], str, str]

TOPICS: tuple[Topic, ...] = (
    (
        ("Run `make serve`.", "运行 `make serve`。"),
        "How do I start Seamount?|How do I start the server from a checkout?|What is the first command to run?"
        "|How can I get it running?|How to launch Seamount?|Which command starts everything?",
        "怎么启动Seamount？|从源码怎么启动服务？|第一条命令是什么？|怎样让它跑起来？|如何启动Seamount？|哪条命令可以启动全部？",
    ),
    (
        ("It starts the server: `seamount serve`.", "它启动服务器：`seamount serve`。"),
        "What does `seamount serve` do?|What is serve for?|What does the serve command do?|Explain `seamount serve`."
        "|Why would I run serve?|What happens with `seamount serve`?",
        "`seamount serve`做什么？|serve是干什么的？|serve命令有什么作用？|解释一下`seamount serve`。|为什么要运行serve？"
        "|运行`seamount serve`会怎样？",
    ),
    (
        ("Run `seamount chat`.", "运行 `seamount chat`。"),
        "How do I chat in the terminal?|Can I talk to the model in a terminal?|Which command opens a terminal chat?"
        "|How to chat without a browser?|How do I start a chat in my shell?|Is there a terminal chat?",
        "怎么在终端里聊天？|能在终端里和模型对话吗？|哪条命令打开终端聊天？|不用浏览器怎么聊天？|怎样在命令行里开始聊天？"
        "|有终端聊天吗？",
    ),
    (
        ("Run `seamount generate`.", "运行 `seamount generate`。"),
        "How do I generate text once?|Which command completes a prompt?|How do I run a single prompt?"
        "|How to complete text from the shell?|Is there a command for one prompt?|How do I continue a text?",
        "怎么生成一次文本？|哪条命令补全提示词？|怎样运行单条提示词？|在命令行里如何补全文本？|有处理单条提示的命令吗？"
        "|怎么续写一段文本？",
    ),
    (
        ("Run `seamount inspect FOLDER`.", "运行 `seamount inspect FOLDER`。"),
        "How do I inspect a checkpoint?|Which command shows what a model folder is?|Does this model fit in memory?"
        "|How can I see the parameters of a checkpoint?|How do I check a model before loading it?"
        "|How to know if a model fits?",
        "怎么查看一个检查点？|哪条命令显示模型文件夹的信息？|怎么知道模型能否放进内存？|怎样查看检查点的参数量？"
        "|加载模型之前怎么检查它？|如何知道模型放不放得下？",
    ),
    (
        ("Run `seamount eval seamount-tiny`.", "运行 `seamount eval seamount-tiny`。"),
        "How do I evaluate the model?|Which command scores the model?|How good is the model?|How to test the skills?"
        "|How do I measure seamount-tiny?|Is there an evaluation command?",
        "怎么评估模型？|哪条命令给模型打分？|模型有多好？|如何测试各项技能？|怎么衡量seamount-tiny？|有评估命令吗？",
    ),
    (
        ("Run `seamount version`.", "运行 `seamount version`。"),
        "Which version is installed?|How do I see the version?|What version of Seamount is this?"
        "|Show me the version command.|How to print the version?|How can I check the version?",
        "安装的是哪个版本？|怎么查看版本？|这是Seamount的哪个版本？|版本命令是什么？|如何显示版本号？|怎样检查版本？",
    ),
    (
        ("Run `make test`.", "运行 `make test`。"),
        "How do I run the tests?|Which command runs all tests?|How to test the code?|How do I start the test suite?"
        "|What runs the test suite?|How can I check that the tests pass?",
        "怎么运行测试？|哪条命令运行全部测试？|如何测试代码？|怎样启动测试套件？|用什么跑测试？|怎么确认测试通过？",
    ),
    (
        ("Run `make check`. It checks format, lint, types and layers.", "运行 `make check`。它检查格式、规范、类型和分层。"),
        "How do I run the linters?|Which command checks the format?|How to check the types?|What does `make check` do?"
        "|How do I lint the code?|How are style and types checked?",
        "怎么运行代码检查？|哪条命令检查格式？|如何检查类型？|`make check`做什么？|怎样检查代码规范？|风格和类型怎么检查？",
    ),
    (
        ("The default port is 8000.", "默认端口是8000。"),
        "What is the default port?|Which port does the server use?|On what port does it listen?|What port is it on?"
        "|Which port should I open?|What is the port number?",
        "默认端口是什么？|服务器用哪个端口？|它监听哪个端口？|端口是多少？|我该打开哪个端口？|端口号是多少？",
    ),
    (
        ("Pass `--port`, for example `seamount serve --port 18080`.", "加上 `--port`，例如 `seamount serve --port 18080`。"),
        "How do I change the port?|Can I use another port?|How to serve on a different port?|The port is taken, what now?"
        "|How do I set the port?|Which option sets the port?",
        "怎么改端口？|可以用别的端口吗？|如何在另一个端口上启动？|端口被占用了怎么办？|怎样设置端口？|哪个选项设置端口？",
    ),
    (
        ("It listens on 127.0.0.1 only.", "它只监听127.0.0.1。"),
        "Which address does it listen on?|What is the default host?|Can other machines reach it?|Is the server public?"
        "|On which host does it run?|Is it open to the network?",
        "它监听哪个地址？|默认主机是什么？|别的机器能访问吗？|服务器是公开的吗？|它在哪个主机上运行？|它对网络开放吗？",
    ),
    (
        ("The API base is http://127.0.0.1:8000/v1.", "API地址是 http://127.0.0.1:8000/v1。"),
        "What is the API base?|Which base URL do I use?|What is the API address?|Where is the API?"
        "|Which URL do I give to the openai client?|What is the base_url?",
        "API地址是什么？|我该用哪个base URL？|接口地址是什么？|API在哪里？|openai客户端填哪个网址？|base_url是什么？",
    ),
    (
        ("Open http://127.0.0.1:8000/ in a browser.", "在浏览器中打开 http://127.0.0.1:8000/。"),
        "Where is the console?|How do I open the chat page?|Is there a web page?|What is the console address?"
        "|Can I chat in a browser?|Where can I chat?",
        "控制台在哪里？|怎么打开聊天页面？|有网页吗？|控制台的地址是什么？|能在浏览器里聊天吗？|在哪里可以聊天？",
    ),
    (
        ("No. Nothing leaves your machine.", "不会。没有任何数据离开你的机器。"),
        "Is my data sent away?|Does it send data to the cloud?|Is my data safe here?|Does anything leave my computer?"
        "|Do you upload my text?|Who else sees my data?",
        "我的数据会被发送出去吗？|它会把数据发到云端吗？|我的数据在这里安全吗？|有东西会离开我的电脑吗？|你会上传我的文字吗？"
        "|还有谁能看到我的数据？",
    ),
    (
        ("I am seamount-tiny, a small demonstration model of Seamount.", "我是seamount-tiny，Seamount的一个小型演示模型。"),
        "Who are you?|What is your name?|What model are you?|What is seamount-tiny?|Introduce yourself.|Are you ChatGPT?",
        "你是谁？|你叫什么名字？|你是什么模型？|seamount-tiny是什么？|介绍一下你自己。|你是ChatGPT吗？",
    ),
    (
        ("I can do arithmetic, extract fields, mask personal data, call tools and answer questions about Seamount.",
         "我会算术、提取字段、遮盖个人信息、调用工具，还能回答关于Seamount的问题。"),
        "What can you do?|What are your skills?|How can you help me?|What are you good at?|Which tasks can you do?|Help",
        "你会做什么？|你有哪些技能？|你能怎么帮我？|你擅长什么？|你能完成哪些任务？|帮助",
    ),
    (
        ("Hello! I am seamount-tiny. How can I help?", "你好！我是seamount-tiny。需要我做什么？"),
        "Hello!|Hi|Good morning|Hey there|Hello, how are you?|Good evening!",
        "你好！|嗨|早上好|您好|你好，最近怎么样？|晚上好！",
    ),
    (
        ("You are welcome.", "不客气。"),
        "Thanks!|Thank you|Many thanks|Thanks a lot.|Great, thank you!|Thank you very much.",
        "谢谢！|谢谢你|非常感谢|多谢了。|太好了，谢谢！|十分感谢。",
    ),
    (
        ("Goodbye!", "再见！"),
        "Bye|Goodbye!|See you later.|Good night|That is all, bye.|See you tomorrow!",
        "再见|拜拜！|回头见。|晚安|就这些，再见。|明天见！",
    ),
    (
        ("MLA is latent attention: it caches one small latent vector per token.",
         "MLA是潜在注意力：每个词元只缓存一个小的潜在向量。"),
        "What is MLA?|What does MLA mean?|Explain latent attention.|Why does DeepSeek use MLA?|MLA?|How does MLA work?",
        "什么是MLA？|MLA是什么意思？|解释一下潜在注意力。|DeepSeek为什么用MLA？|MLA是啥？|MLA是怎么工作的？",
    ),
    (
        ("MoE means mixture of experts: each token uses only a few experts.", "MoE是混合专家：每个词元只使用少数专家。"),
        "What is MoE?|What does MoE mean?|Explain mixture of experts.|What are routed experts?|MoE?|How does MoE work?",
        "什么是MoE？|MoE是什么意思？|解释一下混合专家。|什么是路由专家？|MoE是啥？|MoE是怎么工作的？",
    ),
    (
        ("MTP is multi-token prediction: a block that predicts one token further ahead.",
         "MTP是多词元预测：一个多预测一个词元的模块。"),
        "What is MTP?|What does MTP mean?|Explain multi-token prediction.|What is the MTP block?|MTP?|How does MTP work?",
        "什么是MTP？|MTP是什么意思？|解释一下多词元预测。|MTP模块是什么？|MTP是啥？|MTP是怎么工作的？",
    ),
    (
        ("Run `seamount serve FOLDER`.", "运行 `seamount serve FOLDER`。"),
        "How do I serve my own model?|How do I load a model from a folder?|Can I serve another checkpoint?"
        "|How to serve a model from disk?|How do I run a real DeepSeek model?|How do I use my own weights?",
        "怎么运行我自己的模型？|怎样从文件夹加载模型？|可以加载别的检查点吗？|如何使用磁盘上的模型？"
        "|怎么运行真正的DeepSeek模型？|怎么用我自己的权重？",
    ),
    (
        ("DeepSeek-V2, V3, R1 and V3.1, and the Qwen2, Llama and Qwen3 distills.",
         "DeepSeek-V2、V3、R1和V3.1，以及Qwen2、Llama和Qwen3蒸馏模型。"),
        "Which models are supported?|What models can Seamount run?|Does it run DeepSeek R1?|Which families can I load?"
        "|What model families are there?|Can it run Qwen distills?",
        "支持哪些模型？|Seamount能运行什么模型？|它能运行DeepSeek R1吗？|可以加载哪些系列？|有哪些模型系列？"
        "|能运行Qwen蒸馏模型吗？",
    ),
    (
        ("Safetensors. Pickle weights are refused.", "safetensors。pickle权重会被拒绝。"),
        "Which weight format is read?|Can I load pickle weights?|Does it read safetensors?|What file format do I need?"
        "|Are pickle files loaded?|Which checkpoint format works?",
        "读取哪种权重格式？|能加载pickle权重吗？|它读safetensors吗？|需要什么文件格式？|会加载pickle文件吗？"
        "|哪种检查点格式可用？",
    ),
    (
        ("No. Python files in a checkpoint are never run.", "不会。检查点里的Python文件从不运行。"),
        "Does it run code from a checkpoint?|Is auto_map used?|Are Python files in a model folder run?"
        "|Is remote code trusted?|Can a checkpoint run code?|Will model code be executed?",
        "它会运行检查点里的代码吗？|会使用auto_map吗？|模型文件夹里的Python文件会运行吗？|会信任远程代码吗？"
        "|检查点能执行代码吗？|模型代码会被执行吗？",
    ),
    (
        ("No. It runs on a CPU.", "不需要。它可以在CPU上运行。"),
        "Do I need a GPU?|Is a graphics card required?|Does it need CUDA?|Must I have a GPU?|Do I have to buy a GPU?"
        "|Will it not work without a GPU?",
        "需要GPU吗？|必须有显卡吗？|需要CUDA吗？|一定要有GPU吗？|我必须买GPU吗？|没有GPU就不行吗？",
    ),
    (
        ("Python 3.11 or newer, and make.", "Python 3.11或更新版本，以及make。"),
        "Which Python do I need?|What are the requirements?|Which Python version works?|What must be installed first?"
        "|What does it need to run?|What do I need on a fresh machine?",
        "需要哪个Python？|有什么要求？|哪个Python版本可用？|先要安装什么？|运行它需要什么？|新机器上需要准备什么？",
    ),
    (
        ("Send a POST to /v1/chat/completions.", "向 /v1/chat/completions 发送POST请求。"),
        "How do I call the chat API?|Which endpoint is for chat?|What is the chat endpoint?|How do I send a chat request?"
        "|Where do I post messages?|Which path does chat use?",
        "怎么调用聊天接口？|聊天用哪个端点？|聊天端点是什么？|怎样发送聊天请求？|消息发到哪里？|聊天用哪个路径？",
    ),
    (
        ("GET /v1/models lists the models.", "GET /v1/models 列出模型。"),
        "How do I list the models?|Which endpoint lists models?|Where is the model list?|How to see the served models?"
        "|Which path shows the models?|What models does the server have?",
        "怎么列出模型？|哪个端点列出模型？|模型列表在哪里？|如何查看已加载的模型？|哪个路径显示模型？|服务器上有什么模型？",
    ),
    (
        ("Metrics are at /metrics, in the Prometheus format.", "指标在 /metrics，采用Prometheus格式。"),
        "Where are the metrics?|Is there a Prometheus endpoint?|How do I monitor the server?|Which path has metrics?"
        "|How to scrape the server?|Does it export metrics?",
        "指标在哪里？|有Prometheus端点吗？|怎么监控服务器？|哪个路径有指标？|如何采集指标？|它导出指标吗？",
    ),
    (
        ("Ask /healthz or /readyz.", "访问 /healthz 或 /readyz。"),
        "How do I check the health?|Is there a health check?|How do I know the server is ready?|Which path tells health?"
        "|What is the readiness probe?|How to see if it is alive?",
        "怎么检查健康状态？|有健康检查吗？|怎么知道服务器就绪了？|哪个路径显示健康状态？|就绪探针是什么？|如何看它是否存活？",
    ),
    (
        ("Yes. Set the base URL and any key.", "可以。设置base URL，密钥任意。"),
        "Does the openai client work?|Can I use the openai package?|Is it compatible with OpenAI?"
        "|Will my OpenAI code work?|Does it speak the OpenAI protocol?|Can OpenAI clients connect?",
        "openai客户端能用吗？|能用openai包吗？|它兼容OpenAI吗？|我的OpenAI代码能用吗？|它支持OpenAI协议吗？"
        "|OpenAI客户端能连接吗？",
    ),
    (
        ("English and Chinese.", "英文和中文。"),
        "Which languages do you speak?|Do you speak Chinese?|What languages are there?|Can I write in English?"
        "|In which languages can I ask?|Do you know French?",
        "你会说哪些语言？|你会说中文吗？|有哪些语言？|我可以用英文写吗？|可以用哪些语言提问？|你懂法语吗？",
    ),
    (
        ("About ten million parameters.", "大约一千万个参数。"),
        "How big are you?|How many parameters do you have?|What size is seamount-tiny?|Are you a large model?"
        "|How large is the embedded model?|How small are you?",
        "你有多大？|你有多少参数？|seamount-tiny有多大？|你是大模型吗？|内置模型有多大？|你有多小？",
    ),
    (
        ("Seamount runs, tunes, guards and operates DeepSeek models on your own hardware.",
         "Seamount在你自己的硬件上运行、调优、保护和运维DeepSeek模型。"),
        "What is Seamount?|What is Seamount for?|What does Seamount do?|Tell me about Seamount.|Why use Seamount?"
        "|Describe Seamount.",
        "什么是Seamount？|Seamount是做什么用的？|Seamount能干什么？|给我讲讲Seamount。|为什么用Seamount？|描述一下Seamount。",
    ),
    (
        ("`from seamount import LLM, SamplingParams`", "`from seamount import LLM, SamplingParams`"),
        "How do I use it from Python?|What is the Python API?|How to import the library?|Which class do I import?"
        "|How do I call it in Python?|Show me the Python import.",
        "在Python里怎么用？|Python接口是什么？|怎么导入这个库？|要导入哪个类？|怎样在Python中调用？|Python怎么导入？",
    ),
    (
        ("Apache-2.0.", "Apache-2.0。"),
        "What is the license?|Under which license is it?|Is Seamount open source?|Which licence applies?"
        "|May I use it freely?|How is it licensed?",
        "许可证是什么？|它采用哪个许可证？|Seamount是开源的吗？|适用哪种许可？|可以自由使用吗？|它是怎么授权的？",
    ),
    (
        ("Press Ctrl-C. It stops the answer, not the program.", "按Ctrl-C。它停止回答，不会退出程序。"),
        "How do I stop an answer in the chat?|How to interrupt the model?|Can I cancel an answer?"
        "|Which key stops the output?|What does Ctrl-C do in the chat?|The answer is too long, how do I stop it?",
        "聊天时怎么停止回答？|怎样打断模型？|可以取消回答吗？|哪个键停止输出？|聊天里Ctrl-C做什么？|回答太长了，怎么停止？",
    ),
)  # fmt: skip

# Greeting, thanks, farewell: these stand alone, not inside a phrase such as "please tell me".
SOCIAL_TOPICS = frozenset(
    index for index, (answers, _, _) in enumerate(TOPICS) if answers[1].startswith(("你好", "不客气", "再见"))
)
